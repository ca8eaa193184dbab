"""What the KV cache of a model is made of, and how one request's pages become descriptors."""

import dataclasses
import json
import math
import pathlib

from utils.benchmark_base import Failure, Skip


@dataclasses.dataclass
class Model:
    """Values a token and layer: 2 x num_kv_heads x head_dim, or `latent_dim` for latent attention, which all TP ranks hold."""

    name: str
    num_layers: int
    num_kv_heads: int = 0
    head_dim: int = 0
    latent_dim: int = 0
    bytes_per_value: int = 2

    def bytes_a_token(self, tp):
        """Of one layer on one rank."""
        if self.latent_dim:
            return self.latent_dim * self.bytes_per_value
        return 2 * math.ceil(self.num_kv_heads / tp) * self.head_dim * self.bytes_per_value


MODELS = {model.name: model for model in (
    Model("deepseek_r1", 61, latent_dim=576),
    Model("llama3_1", 80, 8, 128),
    Model("qwen3", 94, 4, 128),
    Model("gpt_oss", 36, 8, 64),
)}


def load_document(path):
    """A mapping from a YAML, JSON or TOML file."""
    text, kind = pathlib.Path(path).read_text(), pathlib.Path(path).suffix.lower()
    if kind == ".json":
        return json.loads(text)
    if kind == ".toml":
        import tomllib

        return tomllib.loads(text)
    try:
        import yaml
    except ImportError:
        raise Skip(f"{path}: YAML needs the package PyYAML (JSON and TOML do not)") from None
    return yaml.safe_load(text)


def load_model(path):
    """The table `model` of a file, or the whole file, with the fields of Model."""
    values = load_document(path)
    values = values.get("model", values)
    known = {field.name for field in dataclasses.fields(Model)}
    try:
        return Model(**{"name": pathlib.Path(path).stem} | {key: values[key] for key in values if key in known})
    except TypeError as error:
        raise Failure(f"--model_config {path}: {error}; fields are {', '.join(sorted(known))}") from None


@dataclasses.dataclass
class Workload:
    """One rank's share of a request. `access` "layer": a descriptor is a page of one layer; "block": of all layers of the stage."""

    model: Model
    isl: int = 10_000
    num_requests: int = 1
    page_size: int = 256
    tp: int = 1
    pp: int = 1
    access: str = "block"

    @property
    def layers(self):
        return math.ceil(self.model.num_layers / self.pp)

    @property
    def io_size(self):
        page = self.page_size * self.model.bytes_a_token(self.tp)
        return page if self.access == "layer" else page * self.layers

    @property
    def batch_size(self):
        pages = math.ceil(self.isl / self.page_size)
        return self.num_requests * (pages * self.layers if self.access == "layer" else pages)

    def row(self):
        return {"Model": self.model.name, "ISL": self.isl, "Num Requests": self.num_requests, "Batch Size": self.batch_size,
                "IO Size": self.io_size, "TP": self.tp, "PP": self.pp, "Page Size": self.page_size, "Access": self.access}
