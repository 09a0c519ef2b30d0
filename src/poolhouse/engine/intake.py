"""Intake: requests checked, tokenised and made to wait for their batch; over-long ones in chunks, joined afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from operator import attrgetter, is_

import numpy as np

from poolhouse.engine.observing import Observer
from poolhouse.engine.options import EngineOptions
from poolhouse.engine.queue import Arrival, CallerQueue, Lead, WaitingRequest
from poolhouse.engine.request import Answer, Request, fail, start
from poolhouse.errors import InvalidRequest, NoStep, did_you_mean
from poolhouse.inputs.content import Content
from poolhouse.inputs.labels import LabelledTokens, Labels
from poolhouse.inputs.late_interaction import LateInteractionTokens
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.pictures import PicturePair, PictureReader, PictureTokens, Written, WrittenPrompt, in_order
from poolhouse.inputs.prompts import Prompt, Role, images_of, prompt_of, role_of
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.models.adapters.adapters import unknown_adapter
from poolhouse.models.files.routes import LookedUp
from poolhouse.models.model import Model
from poolhouse.outputs import Array
from poolhouse.packing.prefixes import SMALLEST_PREFIX, shared_beginnings
from poolhouse.packing.tokens import ShortTexts, Tokens
from poolhouse.params import PoolingParams
from poolhouse.tasks import TOKEN_TASKS, Task, parse_task


class Intake:
    """Makes requests ready to wait, many per call of the tokenizer; safe from several threads at once.

    static_tokenizer: of texts that are looked up instead of run, where the model has such.
    """

    def __init__(
        self, model: Model, options: EngineOptions, tokenizer: Tokenizer, static_tokenizer: Tokenizer | None = None
    ) -> None:
        self.observer: Observer | None = None
        self._model = model
        self._checks = Checks(model, options)
        self._longest_shared = model.facts.longest_shared if options.prefix_sharing else 0
        self._tokenizer, self._static_tokenizer = tokenizer, static_tokenizer
        rules = model.facts.late_interaction
        # What late interaction makes of queries and documents, where the model does it.
        self._late_interaction = (
            None if rules is None else LateInteractionTokens(rules, tokenizer, model.facts.max_tokens)
        )
        reader = model.facts.pictures
        self._picture_tokens = None if reader is None else PictureTokens(reader, tokenizer)
        labelled = model.facts.labelled
        self._labelled = None if labelled is None else labelled.tokens(tokenizer, model.facts.max_tokens)

    def limit(self, params: PoolingParams) -> Limit:
        """How long a prompt with these parameters may be."""
        return self._checks.limit(params)

    def tokenize(self, requests: Sequence[Request]) -> list[Tokens]:
        """The tokens of prompts, however long they are, without running them.

        Raises:
            InvalidRequest: for the first that has none.
        """
        prepared = [self._checks.prepared(request) for request in requests]
        unlimited = [
            replace(one, limit=replace(one.limit, overflow="chunk", max_prompt_tokens=None)) for one in prepared
        ]
        tokens: list[Tokens] = []
        for result in self._encoded(unlimited, whole=True):
            if isinstance(result, InvalidRequest):
                raise result
            tokens.append(result)
        return tokens

    def short(self, texts: Sequence[str], like: Request) -> tuple[ShortTexts, PoolingParams] | None:
        """Those of many texts that need no special care, and the parameters of their vectors; None where there are none.

        like: what is asked of each, by task and options.

        Raises:
            InvalidRequest: something is wrong with all of them, or with one.
        """
        if like.task != "embed" or like.further or like.spans is not None or like.params.late_chunking_params:
            return None
        prepared = self._checks.prepared(replace(like, prompt=Prompt(texts[0])))
        if prepared.prompt.prefix or prepared.adapter or prepared.route:
            return None
        begun = time.perf_counter()
        found = self._tokenizer.encode_short(texts, prepared.limit)
        if self.observer is not None and found is not None:
            self.observer.tokenized(len(found.places), time.perf_counter() - begun)
        return None if found is None else (found, prepared.params)

    def waiting(self, requests: Sequence[Request], queues: Mapping[int, CallerQueue]) -> list[WaitingRequest]:
        """What is to be run. queues: those of one `submit`, by priority.

        Requests that are looked up are answered here, and those that cannot be answered fail here.
        """
        valid: list[tuple[Request, Prepared]] = []
        for request in requests:
            if request.future.cancelled():
                start(request.future)
                continue
            try:
                valid.append((request, self._checks.prepared(request)))
            except InvalidRequest as error:
                fail(request.future, error)
        if not valid:
            return []
        begun = time.perf_counter()
        encoded = self._encoded([prepared for _, prepared in valid])
        seconds = time.perf_counter() - begun
        if self.observer is not None:
            self.observer.tokenized(len(valid), seconds)
        arrival = Arrival(queues[valid[0][0].priority].submitted, seconds)
        waiting: list[WaitingRequest] = []
        for (request, prepared), tokens in zip(valid, encoded, strict=True):
            if isinstance(tokens, InvalidRequest):
                fail(request.future, tokens)
            elif prepared.lookup is not None:
                if start(request.future):
                    timing = arrival.timing(begun + seconds, time.perf_counter())
                    vector = prepared.lookup.vector(tokens.ids, prepared.params)
                    request.future.set_result(Answer(vector, tokens, timing=timing))
            elif len(tokens) == 0 and not self._model.facts.takes_nothing:
                fail(request.future, InvalidRequest("The prompt has no tokens.", "prompt"))
            elif request.params.late_chunking_params is not None and tokens.offsets is None:
                message = "Late chunking needs the offsets of tokens, which this model's tokenizer does not know."
                fail(request.future, InvalidRequest(message, "late_chunking_params"))
            else:
                waiting.extend(self._chunks(request, prepared, tokens, arrival, queues[request.priority]))
        if self._longest_shared and len(waiting) > 1:
            _find_leads(waiting, self._longest_shared)
        return waiting

    def _chunks(
        self, request: Request, prepared: Prepared, tokens: Tokens, arrival: Arrival, queue: CallerQueue
    ) -> Sequence[WaitingRequest]:
        """One, or several for a prompt that is longer than the model reads at once."""
        chunking = request.params.late_chunking_params
        whole = WaitingRequest(
            tokens,
            request.task,
            prepared.params,
            request.future,
            prepared.adapter,
            spans=request.spans if chunking is None else chunking.spans(len(tokens)),
            further=prepared.further,
            route=prepared.route,
            arrival=arrival,
            queue=queue,
        )
        max_tokens = self._model.facts.max_tokens
        if tokens.marks is not None and self._labelled is not None:
            parts = self._labelled.windows(tokens)
        else:
            parts = split(tokens, max_tokens) if len(tokens) > max_tokens else (tokens,)
        return chunks_of(request, whole, parts) if len(parts) > 1 else (whole,)

    def _encoded(self, prepared: Sequence[Prepared], whole: bool = False) -> list[Tokens | InvalidRequest]:
        """Tokens of each prompt, or its error.

        whole: late interaction does not cut texts to the lengths of queries and documents.
        """
        if self._labelled is not None:
            return _with_labels(self._labelled, prepared)
        if self._late_interaction is not None:
            return self._encoded_late(self._late_interaction, prepared, whole)
        if self._static_tokenizer is None or all(one.lookup is None for one in prepared):
            return self._by_tokenizer(prepared, [one.limit for one in prepared])
        results: dict[int, Tokens | InvalidRequest] = {}
        for tokenizer, looked_up in ((self._tokenizer, False), (self._static_tokenizer, True)):
            indexes = [index for index, one in enumerate(prepared) if (one.lookup is not None) == looked_up]
            results.update(zip(indexes, _encoded(tokenizer, [prepared[index] for index in indexes]), strict=True))
        return [results[index] for index in range(len(prepared))]

    def _encoded_late(
        self, rules: LateInteractionTokens, prepared: Sequence[Prepared], whole: bool
    ) -> list[Tokens | InvalidRequest]:
        """Queries and documents by their rules; all else as it stands."""
        limits = [one.limit if one.role is None or whole else rules.limit(one.limit, one.role) for one in prepared]
        encoded = self._by_tokenizer(prepared, limits)
        return [
            rules.finished(tokens, one.role, one.limit.add_special_tokens)
            if one.role is not None and isinstance(tokens, Tokens)
            else tokens
            for one, tokens in zip(prepared, encoded, strict=True)
        ]

    def _by_tokenizer(self, prepared: Sequence[Prepared], limits: Sequence[Limit]) -> list[Tokens | InvalidRequest]:
        """Tokens of each prompt within its limit, those of models that read pictures with pictures in place."""
        if self._picture_tokens is None:
            return self._tokenizer.encode([one.prompt for one in prepared], limits)
        written = [index for index, one in enumerate(prepared) if one.written is not None]
        prompts = [own for one in prepared if (own := one.written) is not None]
        results = dict(
            zip(written, self._picture_tokens.encode(prompts, [limits[index] for index in written]), strict=True)
        )
        rest = [index for index in range(len(prepared)) if index not in results]
        encoded = self._tokenizer.encode([prepared[index].prompt for index in rest], [limits[index] for index in rest])
        results.update(zip(rest, encoded, strict=True))
        return [results[index] for index in range(len(prepared))]


def _find_leads(waiting: Sequence[WaitingRequest], longest: int) -> None:
    """Tell requests of one caller what they begin with together, so that they may wait for one batch."""
    beginnings = shared_beginnings(
        [request.tokens for request in waiting], [request.adapter for request in waiting], longest
    )
    for members, common in beginnings:
        # What prompts of one call have in common by chance, those of the caller's next call may not.
        length = common - common % SMALLEST_PREFIX
        first = waiting[members[0]]
        lead = Lead(hash((first.adapter, first.tokens.ids[:length].tobytes())), length)
        for number in members:
            waiting[number].lead = lead


def _with_labels(reader: LabelledTokens, prepared: Sequence[Prepared]) -> list[Tokens | InvalidRequest]:
    """Tokens of texts with their labels, which `Checks` has found there."""
    return reader.encode(
        [one.prompt.text or "" for one in prepared],
        [labels for one in prepared if (labels := one.labels) is not None],
        [one.limit for one in prepared],
    )


def _encoded(tokenizer: Tokenizer, prepared: Sequence[Prepared]) -> list[Tokens | InvalidRequest]:
    return tokenizer.encode([one.prompt for one in prepared], [one.limit for one in prepared])


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A request made ready for the tokenizer.

    prompt: with its named prefix. params: for the pooler. adapter: its name, or None.
    further: the request's further tasks, with the parameters of each.
    route: the way it goes, of a model that has several. lookup: what its tokens are looked up in, instead of being run.
    role: of a text for late interaction, None for all that is read as it stands.
    written: the prompt of a model that reads pictures, instead of `prompt`; None for pairs that its tokenizer joins.
    labels: those that are read with the text, of models that do.
    """

    prompt: Prompt
    limit: Limit
    params: PoolingParams
    adapter: str | None
    further: tuple[tuple[Task, PoolingParams], ...] = ()
    lookup: LookedUp | None = None
    route: str | None = None
    role: Role | None = None
    written: WrittenPrompt | PicturePair | None = None
    labels: Labels | None = None


def alike(requests: Sequence[Request]) -> list[Request]:
    """Those for plain texts that are asked for as the first of them is, but for their priority."""
    plain = [request for request in requests if _is_plain(request.prompt)]
    if not plain:
        return []
    options, params = _OPTIONS(plain[0]), plain[0].params
    return [
        request
        for request in plain
        if all(map(is_, _OPTIONS(request), options)) and (request.params is params or request.params == params)
    ]


_APART = ("prompt", "params", "priority", "future")
_OPTIONS = attrgetter(*(field.name for field in fields(Request) if field.name not in _APART))


def _is_plain(prompt: Prompt) -> bool:
    more = prompt.pair is not None or prompt.conversation is not None or prompt.prefix or prompt.images
    return prompt.text is not None and not more


_NO_PARAMS = PoolingParams()


class Checks:
    """Checks requests against a model, and completes them by its defaults."""

    def __init__(self, model: Model, options: EngineOptions) -> None:
        self.model = model
        self.options = options
        self.tasks = model.tasks
        self.widths = {task: pipeline.width for task, pipeline in model.pipelines.items()}

    def prepared(self, request: Request) -> Prepared:
        """The request made ready for the tokenizer.

        Raises:
            InvalidRequest: it asks for what the model does not have.
        """
        tasks = self._tasks(request)
        facts = self.model.facts
        request.params.check(request.task, facts.matryoshka, facts.name, tasks[1:], self.widths)
        if request.params.late_chunking_params is not None:
            self._check_late_chunking(request)
        if facts.labelled is not None or request.labels is not None:
            self._check_labels(request)
        params, *further = [self._params(request, task, len(tasks) > 1) for task in tasks]
        if request.prompt.pair is not None:
            request = self._of_pair(request)
        adapter, prompt_name = self._adapter(request, self._prompt_name(request))
        prompt = self._with_prefix(request, prompt_name)
        if facts.pictures is None and (prompt.images or prompt.content is not None):
            paths = [image.path for image in images_of(prompt)]
            raise InvalidRequest(
                f"MultiModalParam is not supported for {facts.architecture}: this model reads texts.", *paths[:1]
            )
        written = (
            None if facts.pictures is None else self._written(facts.pictures, request, prompt, prompt_name, adapter)
        )
        route = self._route(request)
        lookup = self._lookup(request, route)
        # What is looked up needs no special tokens, and some models are made for texts without.
        if lookup is not None or not facts.add_special_tokens:
            request = replace(request, add_special_tokens=False)
        return Prepared(
            prompt,
            self._limit(request, params),
            params.for_pooler(),
            adapter,
            tuple((task, own.for_pooler()) for task, own in zip(tasks[1:], further, strict=True)),
            lookup,
            route,
            self._role(request),
            written,
            request.labels,
        )

    def limit(self, params: PoolingParams) -> Limit:
        """How long a prompt with these parameters may be."""
        return Limit(
            max_tokens=self.model.facts.max_tokens,
            keep=params.truncate_prompt_tokens,
            side=params.truncation_side or self.options.truncation_side,
            overflow=params.overflow or self.options.overflow,
            max_query_tokens=params.max_tokens_per_query,
            max_document_tokens=params.max_tokens_per_doc,
            max_prompt_tokens=self.options.max_prompt_tokens,
        )

    def _of_pair(self, request: Request) -> Request:
        """The request with what joins its two texts, where the tokenizer does not.

        Raises:
            InvalidRequest: it asks for what is known of one text alone.
        """
        if self.model.facts.late_interaction is not None:
            raise InvalidRequest("This model reads texts one by one; score compares the two of a pair.", "prompt")
        if request.offsets or request.spans is not None:
            raise InvalidRequest("Character offsets need one text; a pair has two.", "prompt")
        template = self.options.score_template
        if template is None or request.prompt.template is not None:
            return request
        return replace(request, prompt=replace(request.prompt, template=template))

    def _tasks(self, request: Request) -> tuple[Task, ...]:
        """The request's task and its further ones.

        Raises:
            InvalidRequest: one that does not exist, that the model lacks, or that is named twice.
        """
        if request.task not in self.tasks:
            parse_task(request.task, self.tasks)  # says what the model has
        if not request.further:
            return (request.task,)
        tasks = (request.task, *(parse_task(task, self.tasks) for task in request.further))
        for index, task in enumerate(tasks):
            if task in tasks[:index]:
                raise InvalidRequest(f"The task '{task}' is asked for twice; name each once.", "task", task)
        return tasks

    def _params(self, request: Request, task: Task, shared: bool) -> PoolingParams:
        """The request's parameters for one task, completed by the defaults; shared: some are for its other tasks."""
        params, defaults = request.params.for_task(task) if shared else request.params, self.options.default_params
        if request.spans is not None or request.params.late_chunking_params is not None:
            self.model.pipelines[task].of_spans(task)
        if params.step_tag_id is not None or params.returned_token_ids is not None:
            self.model.pipelines[task].check(params)
        if defaults == _NO_PARAMS:
            return params
        dimensions = defaults.dimensions if task in ("embed", "token_embed") else None
        return replace(
            params,
            dimensions=dimensions if params.dimensions is None else params.dimensions,
            use_activation=defaults.use_activation if params.use_activation is None else params.use_activation,
        )

    def _check_late_chunking(self, request: Request) -> None:
        """Raise InvalidRequest for what cannot be read as one whole text, whose characters its tokens name."""
        params = request.params
        cut = params.truncate_prompt_tokens, params.max_tokens_per_query, params.max_tokens_per_doc, params.overflow
        if not request.prompt.text or request.prompt.pair is not None or request.prompt.conversation is not None:
            why = "takes plain texts that are not empty; no token ids, pairs or messages"
        elif any(limit is not None for limit in cut) or request.lower_case:
            why = "reads a text as it is; leave out what cuts it or lowers its case"
        elif request.further:
            why = "is asked for alone; leave out the other tasks"
        elif self.model.facts.late_interaction is not None:
            why = (
                "makes means of tokens, which this model marks, cuts and skips as late interaction does; load it with "
                "colbert_compat='vllm' for plain texts"
            )
        else:
            return
        raise InvalidRequest(f"Late chunking {why}.", "late_chunking_params")

    def _check_labels(self, request: Request) -> None:
        """Raise InvalidRequest unless it is one text with labels, for a model that reads these together."""
        reader, labels, prompt = self.model.facts.labelled, request.labels, request.prompt
        if reader is None:
            raise InvalidRequest("This model has labels of its own, if any; it reads none with a text.", "labels")
        if labels is None:
            raise InvalidRequest("This model reads labels with each text; name what is looked for.", "labels")
        if labels.descriptions and not reader.describes:
            raise InvalidRequest("This model reads the names of labels alone; leave out their descriptions.", "labels")
        if prompt.text is None or prompt.pair is not None or prompt.prefix or prompt.images or prompt.conversation:
            raise InvalidRequest(
                "Labels are read with plain texts; no token ids, pairs, messages or pictures.", "prompt"
            )
        if request.spans is not None or request.offsets or request.lower_case or not request.add_special_tokens:
            raise InvalidRequest(
                "A text with labels is read as the model was trained; leave out spans, offsets and options of the tokenizer.",
                "tokenization_kwargs",
            )
        if request.prompt_name:
            raise InvalidRequest("A text with labels has no named prompt.", "prompt_name")

    def _prompt_name(self, request: Request) -> str | None:
        """The name of the prompt that the request names, or that its kind of text has."""
        if request.prompt_name is not None:
            return request.prompt_name
        input_type = request.input_type or self._role(request)
        if not input_type:
            return None
        others = (*self._task_adapters, *self.model.routes.tasks)
        return prompt_of(input_type, self.model.facts.prompts, others)

    @property
    def _task_adapters(self) -> tuple[str, ...]:
        """The adapters that came with the checkpoint, which an input type may name."""
        return () if self.model.adapters is None else self.model.adapters.task_names

    def _task_adapter(self, request: Request) -> str | None:
        """The task adapter that an input type names: "code", and "code.query" too."""
        input_type = (request.input_type or "").lower()
        names = (input_type, input_type.partition(".")[0])
        return next((task for name in names for task in self._task_adapters if task.lower() == name), None)

    def _role(self, request: Request) -> Role | None:
        """What a text is to a late-interaction model: a document, unless the request says otherwise."""
        prompt = request.prompt
        if (
            self.model.facts.late_interaction is None
            or (prompt.text is None and prompt.content is None)
            or prompt.images
        ):
            return None
        return role_of(request.input_type) or "document"

    def _written(
        self, reader: PictureReader, request: Request, prompt: Prompt, prompt_name: str | None, adapter: str | None
    ) -> WrittenPrompt | PicturePair | None:
        """The prompt as the model's own code writes it; messages, token ids and texts with their pictures are literal.

        prompt: with its named prompt. prompt_name: its name; "" makes a text literal too.

        Raises:
            InvalidRequest: characters or an instruction where the model has no use for them.
        """
        images, pictures = images_of(prompt), request.pictures
        if len(images) != len(pictures):
            raise InvalidRequest(
                f"The prompt has {len(images)} pictures, of which {len(pictures)} are loaded.", "prompt"
            )
        literal = bool(prompt.images) or prompt.conversation is not None or prompt_name == ""
        if prompt.ids is not None:
            return WrittenPrompt(Written(""), pictures, prompt.ids)
        if prompt.pair is not None and (reader.pair is None or literal):
            return None
        offsets = request.offsets or request.params.late_chunking_params is not None
        if offsets and (images or prompt.text is None or prompt.pair is not None):
            raise InvalidRequest("Character offsets are of texts alone, without pictures.", "prompt")
        if prompt.text is not None and prompt.pair is None and literal and not (reader.alone and images):
            return WrittenPrompt(Written(prompt.text), pictures, text=prompt.text)
        content = prompt.content or Content((prompt.text or "", *prompt.images))
        if reader.alone and images and (content.text or len(images) > 1):
            raise InvalidRequest(
                "This model accepts text-only or image-only inputs, not both: a prompt is a text or one picture.",
                "prompt",
            )
        second = prompt.pair_content or (None if prompt.pair is None else Content((prompt.pair,)))
        instruction = prompt.instruction
        if instruction and not reader.instructs:
            raise InvalidRequest("This model reads no instruction; put it into the query.", "instruction")
        if second is not None:
            if reader.pair is None:
                raise InvalidRequest("This model reads no pairs; score compares the two of a pair.", "prompt")
            return PicturePair(content, second, instruction, pictures)
        role = role_of(request.input_type) or role_of(prompt_name) or ("document" if images else None)
        task = adapter or (None if self.model.adapters is None else self.model.adapters.merged)
        if task in reader.alike:
            role = None
        if reader.instructs:
            instruction = instruction or prompt.prefix or None
        # Dual encoders write no prompts of their own, so all of the checkpoint's stand before texts.
        elif prompt.prefix and (not images if reader.alone else role_of(prompt_name) is None):
            content = Content((prompt.prefix, *content.parts))
        written = in_order(reader.prompts(content, role, instruction), images, pictures)
        if not offsets or prompt.text is None:
            return written
        if prompt.text not in written.written.text or written.pictures:
            raise InvalidRequest(
                "Character offsets: the prompt that this model writes does not hold the text as it is.", "prompt"
            )
        return replace(written, text=prompt.text)

    def _route(self, request: Request) -> str | None:
        """The way of a text through the model, by its input type or prompt; None for a model with one way for all.

        Raises:
            InvalidRequest: the model has no way for it.
        """
        if not self.model.routes.by_task:
            return None
        names = (request.input_type, request.prompt_name)
        return self.model.routes.of(names, role_of(request.input_type) or role_of(request.prompt_name))

    def _lookup(self, request: Request, route: str | None) -> LookedUp | None:
        """The table that answers instead of the model, where this way is looked up."""
        routes = self.model.routes
        if route is None or route not in routes.looked_up:
            return None
        if request.task != "embed" or request.further or request.spans is not None:
            raise InvalidRequest(
                "These texts are looked up, not run through the model: they have embed and sparse vectors alone.",
                "task",
            )
        return routes.static

    def _adapter(self, request: Request, prompt_name: str | None) -> tuple[str | None, str | None]:
        """The names of the request's adapter, if any, and of its prompt."""
        adapters = self.model.adapters
        if adapters is not None and (request.adapter or adapters.sources or adapters.merged):
            name = self._task_adapter(request) if request.adapter is None else request.adapter
            return adapters.choose(name, prompt_name, self.model.facts.prompts)
        if request.adapter:
            raise unknown_adapter(request.adapter, ())
        return None, prompt_name

    def _with_prefix(self, request: Request, name: str | None) -> Prompt:
        """The prompt with its named prefix; ids and conversations are taken as they are."""
        prompts = self.model.facts.prompts
        if name and name not in prompts:
            known = f"It has {sorted(prompts)}." if prompts else "It has none."
            raise InvalidRequest(
                f"The model has no prompt named '{name}'.{did_you_mean(name, prompts)} {known}", "prompt_name", name
            )
        if request.prompt.conversation is not None:
            return self._rendered(request, name)
        if name is None:
            name = self.model.facts.default_prompt_name
        prefix = prompts.get(name, "") if name else ""
        if not prefix or (request.prompt.text is None and request.prompt.content is None) or request.prompt.images:
            return request.prompt
        return replace(request.prompt, prefix=prefix)

    def _rendered(self, request: Request, name: str | None) -> Prompt:
        """The prompt with its messages rendered by the chat template."""
        if name:
            raise InvalidRequest(
                f"The prompt named '{name}' stands before texts; messages say it themselves, as a system message.",
                "prompt_name",
                name,
            )
        prompt = request.prompt
        if prompt.text is not None or prompt.conversation is None:
            return prompt
        if request.offsets:
            raise InvalidRequest("Character offsets need a text; messages have none of their own.", "messages")
        return self.options.conversations.rendered(prompt.conversation)

    def _limit(self, request: Request, params: PoolingParams) -> Limit:
        limit, late_chunking = self.limit(params), params.late_chunking_params is not None
        reader = self.model.facts.labelled
        if reader is not None and reader.windows and params.overflow is None and limit.overflow == "error":
            limit = replace(limit, overflow="chunk")
        limits = [tokens for tokens in (limit.max_prompt_tokens, request.max_tokens) if tokens is not None]
        # A chat template writes the special tokens itself, so its caller decides anew.
        source = request if request.prompt.conversation is None else request.prompt.conversation
        return replace(
            limit,
            overflow="error" if late_chunking else limit.overflow,
            add_special_tokens=source.add_special_tokens,
            max_prompt_tokens=min(limits, default=None),
            lower_case=request.lower_case,
            offsets=request.offsets or late_chunking,
        )


def chunks_of(request: Request, whole: WaitingRequest, parts: Sequence[Tokens]) -> list[WaitingRequest]:
    """Chunks of an over-long prompt; the request is answered when the last one is, and fails when one does."""
    chunks = [replace(whole, tokens=tokens, future=Future(), is_chunk=True) for tokens in parts]
    missing = len(chunks)
    lock = threading.Lock()

    def one_done(_: Future[Answer]) -> None:
        nonlocal missing
        with lock:
            missing -= 1
            if missing:
                return
        if not start(request.future):
            return
        try:
            answer = _joined([chunk.future.result() for chunk in chunks], chunks, whole)
        except Exception as error:  # noqa: BLE001 - the chunk's error is the request's error
            request.future.set_exception(error)
        else:
            request.future.set_result(answer)

    def leave(whole: Future[Answer]) -> None:
        if whole.cancelled():
            for chunk in chunks:
                chunk.future.cancel()

    for chunk in chunks:
        chunk.future.add_done_callback(one_done)
    request.future.add_done_callback(leave)
    return chunks


def _joined(answers: Sequence[Answer], chunks: Sequence[WaitingRequest], whole: WaitingRequest) -> Answer:
    """The answer of a whole prompt, from those of its chunks; it took as long as the chunk that was answered last.

    Raises:
        NoStep: process rewards of a prompt without a step.
    """
    lengths = [chunk.length for chunk in chunks]
    if whole.task == "extract":
        array = _found([answer.array for answer in answers], [chunk.tokens for chunk in chunks])
    else:
        array = join([answer.array for answer in answers], lengths, whole.task)
    further = {task: join([answer.further[task] for answer in answers], lengths, task) for task, _ in whole.further}
    # Of a text of skipped tokens alone, or where nothing is found, no row is an answer.
    if whole.tokens.kept is None and whole.tokens.marks is None and not all(map(len, (array, *further.values()))):
        raise NoStep
    last = max((answer.timing for answer in answers), key=lambda timing: timing.queue_seconds + timing.run_seconds)
    return Answer(array, whole.tokens, len(chunks), further, last)


def _found(arrays: Sequence[Array], windows: Sequence[Tokens]) -> Array:
    """What was found in the windows of a text, by the numbers of its words; what windows share is there twice."""
    firsts = [0 if window.marks is None else window.marks.first_word for window in windows]
    return np.concatenate(
        [array + np.array([first, first, 0, 0], np.float32) for array, first in zip(arrays, firsts, strict=True)]
    )


def split(tokens: Tokens, size: int) -> list[Tokens]:
    """Slices of at most `size` tokens; special tokens stand at the very ends only, as in vLLM."""
    return [
        Tokens(
            ids=tokens.ids[start : start + size],
            types=None if tokens.types is None else tokens.types[start : start + size],
            original_tokens=min(size, len(tokens) - start),
            skip=max(0, min(tokens.skip - start, size)),
            kept=None if tokens.kept is None else tokens.kept[start : start + size],
        )
        for start in range(0, len(tokens), size)
    ]


def join(arrays: Sequence[Array], lengths: Sequence[int], task: Task) -> Array:
    """One answer from the chunks' answers.

    Token tasks: all rows. classify: the mean of the chunks' probabilities (or logits, where asked), weighted by tokens.
    embed: the mean weighted by tokens, brought back to unit length when all chunks had it.
    """
    if task in TOKEN_TASKS:
        return np.concatenate(arrays)
    rows = np.stack(arrays)
    weights = np.asarray(lengths, dtype=np.float32)
    mean: Array = (rows * weights[:, None]).sum(axis=0) / weights.sum()
    if task == "embed" and np.allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-3):
        mean = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return mean.astype(np.float32)
