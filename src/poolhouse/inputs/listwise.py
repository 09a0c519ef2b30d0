"""Listwise prompts of rerankers: all documents of a query in one prompt, or as many as fit.

Source: jina-reranker-v3's own code (Wang, Li, Xiao 2025, "Last but Not Late Interaction").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from poolhouse.errors import InputTooLong
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.tokenizer import Tokenizer

# Documents in one prompt, at most, as in the model's own code.
_MAX_DOCUMENTS = 125
# Texts end to end may have so many tokens more than the sum of theirs.
_SEAM_TOKENS = 2

_SYSTEM = (
    "You are a search relevance expert who can determine a ranking of the passages based on how relevant they are to the "
    "query. If the query is a question, how relevant a passage is depends on how well it answers the question. If not, "
    "try to analyze the intent of the query and assess how well each passage satisfies the intent. If an instruction is "
    "provided, you should follow the instruction when determining the ranking."
)


@dataclass(frozen=True, slots=True)
class ListwiseTokens:
    """Tokens whose vectors a listwise reranker compares: one after each document, one after the query."""

    document_token: str
    query_token: str


@dataclass(frozen=True, slots=True)
class ListwisePrompt:
    """One prompt and how many documents it holds. cut: tokens that its texts lost."""

    prompt: str
    documents: int
    cut: int = 0


class PacksDocuments(Protocol):
    """What writes the prompts of a listwise reranker."""

    def pack(self, query: str, documents: Sequence[str], instruction: str | None, limit: Limit) -> list[ListwisePrompt]:
        """Prompts that hold all documents in their order."""
        ...


@dataclass(frozen=True, slots=True)
class ListwisePrompts:
    """Writes prompts."""

    tokenizer: Tokenizer
    tokens: ListwiseTokens

    def pack(self, query: str, documents: Sequence[str], instruction: str | None, limit: Limit) -> list[ListwisePrompt]:
        """Prompts that hold all documents in their order.

        Raises:
            InputTooLong: a document or the query does not fit into a prompt and may not be cut.
        """
        query = self._clean(query)
        texts = [self._clean(document) for document in documents]
        max_tokens = limit.cut or limit.max_tokens
        cut_each = limit.max_query_tokens or limit.max_document_tokens
        whole = self._prompt(query, texts, instruction)
        # A token of such a tokenizer is at least a byte.
        if not cut_each and len(texts) <= _MAX_DOCUMENTS and len(whole.encode("utf-8", "replace")) <= max_tokens:
            return [ListwisePrompt(whole, len(texts))]
        query, cut = self._cut(query, limit.max_query_tokens, limit.side)
        return self._packed(query, texts, instruction, limit, cut)

    def _packed(
        self, query: str, texts: Sequence[str], instruction: str | None, limit: Limit, query_cut: int
    ) -> list[ListwisePrompt]:
        fixed, one = self._lengths([self._prompt(query, [], instruction), self._passage(_MAX_DOCUMENTS, "")])
        room = (limit.cut or limit.max_tokens) - fixed - _SEAM_TOKENS
        (query_tokens,) = self._lengths([query])
        prompts: list[ListwisePrompt] = []
        waiting: list[str] = []
        left, lost = room, query_cut
        for index, (text, length) in enumerate(zip(texts, self._lengths(texts), strict=True)):
            document, cut = self._cut(text, limit.max_document_tokens, limit.side)
            needed = length - cut + one + _SEAM_TOKENS
            if needed > room:
                if limit.cut is None or room <= one + _SEAM_TOKENS:
                    raise _too_long(limit.max_tokens, index, length, query_tokens)
                document, more = self._cut(document, room - one - _SEAM_TOKENS, limit.side)
                cut, needed = cut + more, room
            if waiting and (needed > left or len(waiting) == _MAX_DOCUMENTS):
                prompts.append(ListwisePrompt(self._prompt(query, waiting, instruction), len(waiting), lost))
                waiting, left, lost = [], room, query_cut
            waiting.append(document)
            left, lost = left - needed, lost + cut
        return [*prompts, ListwisePrompt(self._prompt(query, waiting, instruction), len(waiting), lost)]

    def _prompt(self, query: str, documents: Sequence[str], instruction: str | None) -> str:
        passages = [self._passage(number, document) for number, document in enumerate(documents)]
        instruct = f"<instruct>\n{instruction}\n</instruct>\n" if instruction else ""
        return (
            f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n"
            f"I will provide you with {len(documents)} passages, each indicated by a numerical identifier. "
            f"Rank the passages based on their relevance to query: {query}\n{instruct}" + "\n".join(passages) + "\n"
            f"<query>\n{query}{self.tokens.query_token}\n</query>"
            "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )

    def _passage(self, number: int, document: str) -> str:
        return f'<passage id="{number}">\n{document}{self.tokens.document_token}\n</passage>'

    def _clean(self, text: str) -> str:
        """A text without the tokens that mark documents and the query."""
        for token in (self.tokens.query_token, self.tokens.document_token):
            text = text.replace(token, "")
        return text

    def _cut(self, text: str, tokens: int | None, side: str) -> tuple[str, int]:
        return (text, 0) if tokens is None else self.tokenizer.rendered.cut_text(text, tokens, side)

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text; 0 for invalid Unicode, which is refused when the prompt is tokenised."""
        return [len(ids) if not isinstance(ids, Exception) else 0 for ids in self.tokenizer.rendered.content(texts)]


def _too_long(max_tokens: int, index: int, length: int, query: int) -> InputTooLong:
    longer = "query" if 2 * query > length else "document"
    return InputTooLong(
        f"This model's maximum context length is {max_tokens} tokens, which document {index} ({length} tokens) does not fit "
        f"into beside the query ({query} tokens, twice) and the template. Shorten the {longer}, cut "
        "both with max_tokens_per_doc and max_tokens_per_query, or cut the documents with truncate_prompt_tokens=-1.",
        "input_tokens",
        length,
    )
