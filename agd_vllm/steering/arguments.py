"""What vLLM is started with for steering, and what a file of vectors must be for a model."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

from agd_vllm.models.architectures import STEER
from agd_vllm.models.class_overrides import class_override
from agd_vllm.models.inspect import ModelInfo
from agd_vllm.output.identity import same_model
from agd_vllm.steering.vector_file import SteeringVectors, absolute, read_vectors

CONFIG = "agd_steering"
log = logging.getLogger("agd_vllm")

# vLLM's engine argument for what its worker can be told.
EXTENSION = "worker_extension_cls"


def engine_args(model: ModelInfo, file: str, norm: bool, given: dict[str, Any]) -> dict[str, Any]:
    """vLLM's engine arguments beside the `given` ones. The engine's `collective_rpc("set_steering_strength")` is to be
    called before it decodes: until then the strength is 0.

    Raises ValueError, in one line, for a model, a file or arguments that it has no code for (InputUnusable for a file
    that cannot be opened).
    """
    if given.get(EXTENSION):
        raise ValueError(f"--engine-arg {EXTENSION}: strategy steer has its own; leave it out")
    config, overrides = class_override(model, STEER, given, "that steers")
    vectors = read_vectors(file)
    check_vectors(file, vectors, model, config.hidden_size)
    settings = {"file": absolute(file), "digest": vectors.digest, "norm": norm}
    return {
        "model_class_overrides": overrides,
        # Part of the key of vLLM's compile cache, and so is the digest: files may change under their names.
        "additional_config": {CONFIG: settings},
        EXTENSION: "agd_vllm.steering.worker.SteeringWorker",
    }


def check_vectors(file: str, vectors: SteeringVectors, model: ModelInfo, width: int) -> None:
    """Raises ValueError, in one line, for vectors of another model than one of `width` features."""
    same = same_model(vectors.model_digest, model.digest)
    if same is None and _same_name(vectors.model, model.path):
        _warn_of_name(f"--steering {file}: only the name says that its vectors are of {model.path}")
    elif not same:
        raise ValueError(
            f"--steering {file}: its vectors are of the model {vectors.model}, not of {model.path}; make them of this "
            "one with `agd-vllm vectors`"
        )
    check_layers("--steering", vectors.layers, model.num_layers)
    for number, vector in vectors.layers.items():
        if len(vector) != width:
            raise ValueError(
                f"--steering {file}: layer {number} has {len(vector)} features, those of {model.path} have {width}; "
                "make vectors of this model with `agd-vllm vectors`"
            )


def check_layers(option: str, numbers: Any, num_layers: int) -> None:
    """Raises ValueError, in one line, for the number of a layer that the model does not have."""
    for number in numbers:
        if not 0 <= number < num_layers:
            raise ValueError(f"{option}: no layer {number}; the model has layers 0 to {num_layers - 1}")


@functools.cache
def _warn_of_name(message: str) -> None:
    """Once, however often a run checks its file."""
    log.warning("%s", message)


def _same_name(made_of: str, path: str) -> bool:
    """Whether two names may be of one model: folders move, and a hub id may lie in one of its name."""
    last = [os.path.basename(os.path.realpath(name)) for name in (made_of, path)]
    return made_of == path or last[0] == last[1]
