"""Errors in Cog's log are shown without the prefixes that Cog and Python add."""

import pytest

from musicgen_svc.cli.cog_log import sentence


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("Prediction failed: Async prediction failed: InputError: seed is -2; no.", "seed is -2; no."),
        ("Prediction failed: Prediction failed: ValueError: a b", "a b"),
        ("Prediction failed: Input validation error: 404 for url", "Input validation error: 404 for url"),
        (
            "worker setup failed: worker setup failed (slot 4585da5b-c6d8-4d52-9d9a-6313350bbf16): "
            "Setup failed: setup failed: WeightsError: COG_WEIGHTS is 'x', where there is nothing.",
            "COG_WEIGHTS is 'x', where there is nothing.",
        ),
        (
            "Traceback ...\n  File\nmusicgen_svc.errors.AudioError: input_audio is no audio.\n",
            "input_audio is no audio.",
        ),
        ("KeyError: 'x'", "KeyError: 'x'"),
        ("Worker crashed", "Worker crashed"),
        ("", "no reason was given."),
    ],
)
def test_an_error_is_cut_down_to_the_services_sentence(error: str, words: str) -> None:
    assert sentence(error) == words
