"""Options of `Decoder`: the same checks as on the command line, before anything is loaded."""

import pytest

from agd_vllm import Decoder


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scorer", "foward"),
        ("rule", "lrp"),
        ("dtype", "fp16"),
        ("attribution_dtype", "int8"),
        ("strategy", "sampling"),
        ("top_k", 100_000),
        ("tau", float("nan")),
    ],
)
def test_a_wrong_value_is_named(smollm2, name, value):
    with pytest.raises(ValueError, match=name) as error:
        Decoder(str(smollm2), **{name: value})
    assert str(value) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_decoder_without_a_model():
    with pytest.raises(ValueError, match="model is missing"):
        Decoder()
