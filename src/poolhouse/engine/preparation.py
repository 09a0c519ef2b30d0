"""Preparation: what a request becomes before its prompt is tokenised."""

from __future__ import annotations

from dataclasses import dataclass, replace

from poolhouse.engine.options import EngineOptions
from poolhouse.engine.request import Request
from poolhouse.errors import InvalidRequest, did_you_mean
from poolhouse.inputs.input_types import Role, prompt_of, role_of
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.prompts import Prompt
from poolhouse.models.adapters import unknown_adapter
from poolhouse.models.model import Model
from poolhouse.params import PoolingParams
from poolhouse.tasks import parse_task

_NO_PARAMS = PoolingParams()


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A request made ready for the tokenizer.

    prompt: with its named prefix. params: for the pooler. adapter: its name, or None.
    side: of a text for late interaction, None for all that is read as it stands.
    """

    prompt: Prompt
    limit: Limit
    params: PoolingParams
    adapter: str | None
    side: Role | None = None


class Preparation:
    """Completes and checks requests against a model."""

    def __init__(self, model: Model, options: EngineOptions) -> None:
        self.model = model
        self.options = options

    def of(self, request: Request) -> Prepared:
        """The request made ready.

        Raises:
            InvalidRequest: it asks for what the model does not have.
        """
        params = self._params(request)
        adapter, prompt_name = self._adapter(request, self._prompt_name(request))
        prompt = self._with_prefix(request, prompt_name)
        return Prepared(prompt, self._limit(request, params), params.for_pooler(), adapter, self._side(request))

    def limit(self, params: PoolingParams) -> Limit:
        """How long a prompt with these parameters may be."""
        return Limit(
            max_tokens=self.model.facts.max_tokens,
            keep=params.truncate_prompt_tokens,
            side=params.truncation_side,
            overflow=params.overflow or self.options.overflow,
            max_query_tokens=params.max_tokens_per_query,
            max_document_tokens=params.max_tokens_per_doc,
            longest=self.options.max_prompt_tokens,
        )

    def _params(self, request: Request) -> PoolingParams:
        """The request's parameters, completed by the defaults, checked against the model."""
        parse_task(request.task, self.model.tasks)
        params, defaults = request.params, self.options.default_params
        params.check(request.task, self.model.facts.matryoshka, self.model.facts.name)
        if request.spans is not None:
            self.model.pipelines[request.task].of_spans()
        if params.step_tag_id is not None or params.returned_token_ids is not None:
            self.model.pipelines[request.task].check(params)
        if defaults == _NO_PARAMS:
            return params
        dimensions = defaults.dimensions if request.task in ("embed", "token_embed") else None
        return replace(
            params,
            dimensions=dimensions if params.dimensions is None else params.dimensions,
            use_activation=defaults.use_activation if params.use_activation is None else params.use_activation,
        )

    def _prompt_name(self, request: Request) -> str | None:
        """The name of the prompt that was asked for, by itself or by what the text is."""
        if request.prompt_name is not None:
            return request.prompt_name
        word = request.input_type or self._side(request)
        return prompt_of(word, self.model.facts.prompts) if word else None

    def _side(self, request: Request) -> Role | None:
        """The side that a text of a late-interaction model stands on: a document, unless somebody says otherwise."""
        if self.model.facts.late_interaction is None or request.prompt.text is None:
            return None
        return role_of(request.input_type) or "document"

    def _adapter(self, request: Request, prompt_name: str | None) -> tuple[str | None, str | None]:
        """The names of the request's adapter, if any, and of its prompt."""
        adapters = self.model.adapters
        if adapters is not None:
            return adapters.choose(request.adapter, prompt_name, self.model.facts.prompts)
        if request.adapter:
            raise unknown_adapter(request.adapter, ())
        return None, prompt_name

    def _with_prefix(self, request: Request, name: str | None) -> Prompt:
        """The prompt with its named prefix; ids are taken as they are."""
        prompts = self.model.facts.prompts
        if name and name not in prompts:
            known = f"It has {sorted(prompts)}." if prompts else "It has none."
            raise InvalidRequest(
                f"The model has no prompt named '{name}'.{did_you_mean(name, prompts)} {known}", "prompt_name", name
            )
        if name is None:
            name = self.model.facts.default_prompt_name
        prefix = prompts.get(name, "") if name else ""
        if not prefix or request.prompt.text is None:
            return request.prompt
        return replace(request.prompt, prefix=prefix)

    def _limit(self, request: Request, params: PoolingParams) -> Limit:
        limit = self.limit(params)
        limits = [most for most in (limit.longest, request.max_tokens) if most is not None]
        return replace(
            limit,
            add_special_tokens=request.add_special_tokens,
            longest=min(limits, default=None),
            lower_case=request.lower_case,
            places=request.places,
        )
