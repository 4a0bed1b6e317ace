"""The file of steering vectors as it is read again, and what is no such file."""

import pytest
import torch
from safetensors.torch import save_file

from agd_vllm.steering.rule import steered
from agd_vllm.steering.vector_file import SteeringVectors, read_vectors, write_vectors


def test_vectors_are_read_as_they_were_written(tmp_path):
    vectors = SteeringVectors({11: torch.randn(8), 2: torch.randn(8)}, "grains", "some/model")
    write_vectors(str(tmp_path / "v.safetensors"), vectors)
    read = read_vectors(f"file://{tmp_path}/v.safetensors")
    assert (read.method, read.model, read.digest) == ("grains", "some/model", vectors.digest)
    assert [*read.layers] == [2, 11]
    assert all(torch.equal(read.layers[number], vectors.layers[number]) for number in read.layers)
    assert vectors.digest != SteeringVectors({2: vectors.layers[11], 11: vectors.layers[2]}, "", "").digest


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"layer.1": torch.ones(3)}, None, "its metadata names no method"),
        ({"layer.1": torch.ones(3)}, {"digest": "0"}, "its digest is not that of its vectors"),
        ({"layer.1": torch.ones(3).bfloat16()}, {}, r"layer.1 is bfloat16 \[3\], and should be float32 \[d\]"),
        ({"layer.1": torch.ones(3, 1)}, {}, r"layer.1 is float32 \[3, 1\]"),
        ({"layer.1": torch.tensor([1.0, torch.nan])}, {}, "layer.1 holds numbers that are not finite"),
        ({"layers.1": torch.ones(3)}, {}, "'layers.1' is no layer.<i>"),
        ({}, {}, "it holds no layer"),
    ],
)
def test_what_is_no_such_file_is_said_in_one_line(tmp_path, tensors, metadata, words):
    given = None if metadata is None else {"method": "caa", "model": "m", "digest": ""} | metadata
    save_file(tensors, tmp_path / "v.safetensors", given)
    with pytest.raises(ValueError, match=f"^--steering .*{words}.*; give a file that `agd-vllm vectors`"):
        read_vectors(str(tmp_path / "v.safetensors"))


def test_a_file_names_its_layers_and_metadata_once(tmp_path):
    path = tmp_path / "v.safetensors"
    write_vectors(str(path), SteeringVectors({1: torch.ones(2)}, "caa", "m"))
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].replace(b'"model":', b'"model":"other","model":')
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    with pytest.raises(ValueError, match="model is named twice"):
        read_vectors(str(path))


def test_the_length_of_every_token_is_kept_and_a_strength_of_nothing_changes_nothing():
    torch.manual_seed(0)
    stream, offset = torch.randn(5, 16), torch.randn(16)
    kept = steered(stream, offset, norm=True)
    torch.testing.assert_close(kept.norm(dim=-1), stream.norm(dim=-1))
    torch.testing.assert_close(steered(stream, offset, norm=False), stream + offset)
    # A token by itself is as among others: nothing runs over tokens.
    torch.testing.assert_close(kept[2:3], steered(stream[2:3], offset, norm=True), rtol=0, atol=0)
    assert torch.equal(steered(stream, 0 * offset, norm=True), stream)
    assert steered(torch.zeros(1, 16), 0 * offset, norm=True).isfinite().all()
