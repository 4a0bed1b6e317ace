"""Whose vectors a file holds: the model's digest decides, for a file without one the model's name."""

import logging

import pytest
import torch

from agd_vllm.models.inspect import ModelInfo
from agd_vllm.steering.arguments import _warn_of_name, check_vectors
from agd_vllm.steering.vector_file import SteeringVectors, read_vectors, write_vectors

WIDTH = 8


def info(path: str, digest: str | None) -> ModelInfo:
    return ModelInfo(path, None, False, frozenset(), None, 64, 100, 4, 2, digest)


def vectors(model: str, digest: str | None) -> SteeringVectors:
    return SteeringVectors({1: torch.ones(WIDTH)}, "caa", model, digest)


@pytest.fixture
def warnings(caplog):
    _warn_of_name.cache_clear()
    caplog.set_level(logging.WARNING, "agd_vllm")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("made_of", "digest", "path", "own"),
    [
        # `agd-vllm vectors --model .` in one folder, `decode --model /elsewhere/m` in another.
        (".", "d1", "/elsewhere/m", "d1"),
        ("owner/name", "commit c1", "owner/name", "commit c1"),
    ],
)
def test_vectors_of_the_same_weights_fit_whatever_the_name(warnings, made_of, digest, path, own):
    check_vectors("v", vectors(made_of, digest), info(path, own), WIDTH)
    assert warnings() == []


@pytest.mark.parametrize(
    ("made_of", "digest", "path", "own"),
    [(".", "d1", ".", "d2"), ("/models/m", "d1", "/models/m", "d2"), ("a", None, "b", "d1"), ("a", "d1", "b", None)],
)
def test_vectors_of_other_weights_are_refused_whatever_the_name(made_of, digest, path, own):
    with pytest.raises(ValueError, match=f"its vectors are of the model {made_of}, not of {path}; make them") as error:
        check_vectors("v", vectors(made_of, digest), info(path, own), WIDTH)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("digest", "own"), [(None, "d1"), ("d1", None), ("commit c1", "d1"), (None, None)])
def test_without_a_digest_the_name_decides_with_one_warning(warnings, digest, own):
    for _ in range(3):
        check_vectors("v", vectors("/old/m", digest), info("/new/m", own), WIDTH)
    assert warnings() == ["--steering v: only the name says that its vectors are of /new/m"]


@pytest.mark.parametrize("digest", [None, "d1"])
def test_a_file_keeps_the_digest_of_its_model(tmp_path, digest):
    write_vectors(f"{tmp_path}/v.safetensors", vectors("m", digest))
    assert read_vectors(f"{tmp_path}/v.safetensors").model_digest == digest


def test_every_name_of_a_folder_has_the_same_digest(smollm2, tmp_path, monkeypatch):
    """By another name of the same folder."""
    from agd_vllm.models.inspect import inspect_model

    (tmp_path / "link").symlink_to(smollm2)
    monkeypatch.chdir(smollm2)
    digests = {inspect_model(str(path))[0].digest for path in (smollm2, tmp_path / "link", ".")}
    assert len(digests) == 1 and None not in digests
