"""Input types: the words of several APIs for one idea."""

from __future__ import annotations

import pytest

from poolhouse.errors import InvalidRequest
from poolhouse.inputs.prompts import prompt_of, role_of


@pytest.mark.parametrize(
    ("word", "prompts", "name"),
    [
        ("query", {"query": "q: ", "passage": "p: "}, "query"),
        ("search_query", {"query": "q: "}, "query"),
        ("document", {"query": "q: ", "passage": "p: "}, "passage"),
        ("search_document", {"document": "", "passage": "p: "}, "document"),
        ("image", {"document": "d: ", "query": "q: "}, "document"),
        ("passage", {"document": "d: ", "passage": "p: "}, "passage"),
        ("query", {"retrieval.query": "r: "}, "retrieval.query"),
        ("classification", {"Classification": "c: "}, "Classification"),
        ("STS", {"STS": "s: "}, "STS"),
        ("query", {}, None),
        ("clustering", {"query": "q: "}, None),
    ],
)
def test_an_input_type_means_the_prompt_that_the_checkpoint_has_for_it(word, prompts, name):
    assert prompt_of(word, prompts) == name


def test_an_unknown_input_type_is_refused_with_what_is_possible():
    with pytest.raises(InvalidRequest, match=r"Unsupported input_type 'quary'. Did you mean 'query'\?") as caught:
        prompt_of("quary", {"query": "q: "})
    assert caught.value.parameter == "input_type"


@pytest.mark.parametrize("word", ["Clustering", "retrieval", "search_query"])
def test_an_input_type_may_be_a_task_of_the_model(word):
    assert prompt_of(word, {}, ("retrieval", "clustering")) is None


def test_a_model_with_tasks_refuses_those_that_it_has_not():
    with pytest.raises(InvalidRequest, match=r"'classification'.*\['clustering', 'document', 'query', 'retrieval'\]"):
        prompt_of("classification", {}, ("retrieval", "clustering"))


@pytest.mark.parametrize(
    ("word", "role"),
    [("search_query", "query"), ("Passage", "document"), ("clustering", None), (None, None), ("", None)],
)
def test_an_input_type_says_on_which_side_of_a_search_a_text_stands(word, role):
    assert role_of(word) == role
