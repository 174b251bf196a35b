"""What the command line reads from a schema: descriptions for --help, and an input that is never valid."""

from jsonschema import Draft7Validator

from musicgen_svc.cli.schema_fields import described, impossible_input
from tests.cli.repository import SCHEMA


def test_every_input_is_described_with_what_it_accepts() -> None:
    text = described(SCHEMA)
    assert "  duration: a whole number from 1 to 600; default 8\n" in text
    assert "  output_format: one of wav, mp3; default wav\n" in text
    assert "  continuation: true or false; default false\n" in text
    for name in SCHEMA["components"]["schemas"]["Input"]["properties"]:
        assert f"\n  {name}: " in f"\n{text}"


def test_the_question_for_progress_can_never_be_a_request() -> None:
    question = impossible_input(SCHEMA)
    assert question is not None
    assert not Draft7Validator({"$ref": "#/components/schemas/Input", **SCHEMA}).is_valid(question)
    assert impossible_input(None) is None
