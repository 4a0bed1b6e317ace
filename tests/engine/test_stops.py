"""When rows end and what their text is: the same as of vLLM's own detokenizer, whatever the tokenizer and the end."""

import random
from types import SimpleNamespace

import pytest
from tiny_tokenizers import byte_level, sentencepiece, tiny, wrapped
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast
from vllm import SamplingParams
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

from agd_vllm.engine.stops import StopCheck
from agd_vllm.prompts.tokenizer import load_tokenizer
from agd_vllm.records import PreparedRow, Roi

END = 3  # <|end|>, the EOS token of the tiny tokenizers


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return load_tokenizer(str(smollm2))


@pytest.mark.parametrize("end", ["token", "string", "eos", "length"])
def test_text_without_its_end(tokenizer, end):
    ids = tokenizer.encode("Hello there. STOP", add_special_tokens=False)
    eos = tokenizer.eos_token_id
    row = PreparedRow(
        "r",
        [1, 2],
        Roi(),
        max_tokens=len(ids) if end == "length" else 40,
        stop=(" STOP",) if end == "string" else (),
        stop_token_ids=(ids[-1],) if end == "token" else (),
    )
    stops = StopCheck(row, frozenset({eos}), tokenizer)
    reasons = [stops.add(token) for token in ([*ids, eos] if end == "eos" else ids)]
    assert set(reasons[:-1]) == {None}
    assert reasons[-1] == ("length" if end == "length" else "stop")
    expected = {
        "token": tokenizer.decode(ids[:-1]),
        "string": "Hello there.",
        "eos": "Hello there. STOP",
        "length": "Hello there. STOP",
    }
    assert stops.text() == expected[end]


def with_byte_fallback(prepend: bool, *last: decoders.Decoder) -> PreTrainedTokenizerFast:
    """Llama 2 and Mistral (with Strip at the end), or Gemma: bytes that are no character become U+FFFD."""
    made: Tokenizer = sentencepiece(prepend)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, *last])
    return wrapped(made, None)


TOKENIZERS = {
    "llama2": lambda: with_byte_fallback(True, decoders.Strip(" ", 1, 0)),
    "gemma": lambda: with_byte_fallback(False),
    "gpt2": lambda: wrapped(byte_level(False), None),
    "bert": lambda: tiny("wordpiece"),
}


def oracle(tokenizer, row):
    """vLLM's detokenizer for a row, and its answer to each token as the engine reports it."""
    params = SamplingParams(stop=list(row.stop), min_tokens=row.min_tokens, max_tokens=row.max_tokens)
    request = SimpleNamespace(request_id="r", prompt_token_ids=row.prompt_token_ids, sampling_params=params)
    return FastIncrementalDetokenizer(tokenizer, request)


def decode_both(tokenizer, row, output):
    """Text and finish reason of ours and of vLLM's, token by token up to the row's end."""
    ours, theirs = StopCheck(row, frozenset({END}), tokenizer), oracle(tokenizer, row)
    for count, token in enumerate(output, start=1):
        stopped = token in (END, *row.stop_token_ids)
        expected = "stop" if theirs.update([token], stopped) is not None or stopped else None
        expected = expected or ("length" if count == row.max_tokens else None)
        assert ours.add(token) == expected
        if expected:
            break
    return ours.text(), theirs.get_next_output_text(finished=True, delta=False)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_any_tokens_read_as_in_vllm(kind):
    tokenizer = TOKENIZERS[kind]()
    draw = random.Random(0)
    fallback = [i for token, i in tokenizer.get_vocab().items() if token.startswith("<0x")]
    special, every = list(range(5)), range(len(tokenizer))
    sentences = ("Answer in French.", "naïve 日本 🤖 Привет")
    spoken = [tokenizer.encode(text, add_special_tokens=False) for text in sentences]
    stop_strings = [" ", "n", "in", "in F", "French", "�", "\n", "ï", "s we", "本"]
    ends = set()
    for _ in range(3000):
        pools = [draw.choice([fallback or every, special, every, every]) for _ in range(draw.randint(1, 24))]
        output = [token for pool in pools for token in (draw.choice([*spoken, [draw.choice(pool)]]))]
        prompt = [draw.choice(draw.choice([fallback or every, special, every])) for _ in range(draw.randint(0, 12))]
        prompt = draw.choice([prompt, *spoken]) or [1]
        row = PreparedRow(
            "r",
            prompt,
            Roi(),
            max_tokens=draw.choice([3, 5, 1000]),
            min_tokens=draw.choice([0, 0, 3]),
            stop=tuple(draw.sample(stop_strings, draw.randint(0, 3))),
            stop_token_ids=tuple(draw.sample(every, draw.choice([0, 3]))),
        )
        ours, theirs = decode_both(tokenizer, row, output)
        assert ours == theirs, (row, output)
        ends.add((bool(row.stop), ours == ""))
    assert len(ends) == 4


@pytest.mark.parametrize("stop", [(), ("never",)])
def test_bytes_that_are_no_character_with_the_next_one(stop):
    """Two bytes are a letter, three are none: plain vLLM begins its stream anew, where the row was lost."""
    tokenizer = TOKENIZERS["llama2"]()
    output = tokenizer.convert_tokens_to_ids(["<0xD7>", "<0xBB>", "<0xB4>"])
    output += tokenizer.encode("as.", add_special_tokens=False)
    row = PreparedRow("r", tokenizer.encode("Answer", add_special_tokens=False), Roi(), max_tokens=20, stop=stop)
    ours, theirs = decode_both(tokenizer, row, output)
    assert ours == theirs
    assert ours.startswith("׻")


@pytest.mark.parametrize("end", ["eos", "length", "string", "token"])
def test_prompt_and_text_read_on(end):
    """A first word keeps its space, whatever ends the row."""
    tokenizer = TOKENIZERS["llama2"]()
    output = tokenizer.encode("in French", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(output[0]).startswith("▁")
    final = tokenizer.convert_tokens_to_ids(".")
    row = PreparedRow(
        "r",
        tokenizer.encode("Answer", add_special_tokens=False),
        Roi(),
        max_tokens=len(output) if end == "length" else 90,
        stop=(".",) if end == "string" else (),
        stop_token_ids=(final,) if end == "token" else (),
    )
    ours, theirs = decode_both(tokenizer, row, [*output, END if end == "eos" else final])
    assert ours == theirs
    assert "Answer" + ours == "Answer in French"


@pytest.mark.parametrize(
    ("stop", "text"), [(("er", "r"), "Answ"), (("r", "er"), "Answe"), (("swer", "w"), "Ans"), (("wer", "s"), "An")]
)
def test_the_stop_string_that_is_complete_first_ends_the_text(stop, text):
    tokenizer = TOKENIZERS["gpt2"]()
    output = tokenizer.encode("Answer in French.", add_special_tokens=False)
    assert len(output) < 6  # several stop strings are complete with one token
    row = PreparedRow("r", [5], Roi(), max_tokens=20, stop=stop)
    assert decode_both(tokenizer, row, output) == (text, text)
