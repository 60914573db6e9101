"""What the service is told: frozen, typed, from CLIPSERVE_* environment variables and arguments.

Built once, in the command line, by `load_settings`, and passed to `create_app`. The string under
each field says its unit and meaning.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from clipserve.embed import count_processors
from clipserve.errors import ConfigError
from clipserve.images import ImageLimits

T = TypeVar("T")
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0)]


def _split(value: Any) -> Any:
    """Environment variables hold lists as words between commas."""
    if isinstance(value, str | int):
        return [word.strip() for word in str(value).split(",") if word.strip()]
    return value


Several = Annotated[tuple[T, ...], NoDecode, BeforeValidator(_split)]


class Settings(BaseSettings):
    """Limits and addresses of one service; the same names, upper case, as CLIPSERVE_* variables."""

    model_config = SettingsConfigDict(
        env_prefix="CLIPSERVE_", frozen=True, extra="forbid", use_attribute_docstrings=True
    )

    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 for every interface"""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """port to listen on; 0 takes a free one"""
    device: str = "auto"
    """where models compute: cpu, cuda or cuda:N; auto: a GPU if there is one"""
    dtype: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """what models compute in; auto: bf16 where the CPU or GPU is faster in it and the vectors stay
    the same, else fp32; int8: for a CPU with VNNI that has no AMX, twice as fast, less exact"""
    collections_root: Path | None = None
    """folder whose collections are all served, beside those named on the command line"""
    model_roots: Several[Path] = ()
    """folders from which a reload may take a model; without one it reads the model's own again"""
    label_sets: Path | None = None
    """TOML or JSON file, or a folder of them, of labels that classifications may name"""
    jobs_dir: Path | None = None
    """folder where bulk jobs wait and are resumed from; without one there are no jobs"""
    read_only: bool = False
    """refuse to change collections over REST"""
    rebuild_indexes: bool = True
    """build a collection's index anew, in the background, when a tenth of it, or 50,000 vectors,
    were written since"""

    api_keys_file: Path | None = None
    """file of hashed keys, as `clipserve keys` writes it; every request to /v1 then needs a key"""
    insecure: bool = False
    """listen on other addresses than loopback although there are no keys"""
    rate_limit_per_minute: CountOrZero = 0
    """requests of one key, or of one address where there are no keys; beyond it 429; 0 is no
    limit"""
    cors_origins: Several[str] = ()
    """origins whose pages may call this service from a browser, between commas; none by default"""

    allow_fetch: bool = False
    """fetch pictures from the URLs that clients give"""
    fetch_hosts: Several[str] = ()
    """the only hosts to fetch from, between commas, .example.org for all below it; without one
    every public host"""
    fetch_ports: Several[Port] = (80, 443)
    """ports to fetch from, between commas"""
    fetch_timeout_s: Seconds = 10.0
    """one picture may take this long to fetch, redirects included"""
    fetch_max_redirects: CountOrZero = 3
    """redirects followed, each checked as the first address was"""
    fetch_connections: Count = 16
    """fetches at once"""

    max_body_bytes: Count = 64 * 2**20
    """largest request body"""
    max_inflight_bytes: Count = 512 * 2**20
    """bodies of all requests being served at once, what they found, as it takes memory, and their
    answers over 64 KB; beyond it requests get 429"""
    max_headers: Count = 100
    """header lines of one request; beyond it 431"""
    max_header_bytes: Count = 32 * 2**10
    """all header lines of one request; beyond it 431"""
    max_connections: Count = 4096
    """open connections; beyond it new ones are closed"""
    max_requests: Count = 512
    """requests being served at once, health checks aside; beyond it requests get 429"""
    max_items: Count = 256
    """pictures and texts in one request"""
    max_text_chars: Count = 10_000
    """characters of one text; a longer one is refused, though the model reads the first few hundred
    at most"""
    max_labels: Count = 2000
    """labels in one classification, and in a stored set"""
    max_prompts: Count = 8192
    """labels times templates in one classification"""
    max_jobs: Count = 100
    """bulk jobs that are known at once; the oldest ended ones are forgotten, then those
    nobody started for a day; beyond it 429"""
    max_queue_items: Count = 2048
    """pictures and texts waiting for one model; beyond it requests get 429"""
    max_image_bytes: Count = 50 * 2**20
    """largest encoded picture"""
    max_image_pixels: Count = 64_000_000
    """largest picture, width times height"""
    max_image_aspect: Annotated[float, Field(ge=1)] = 100.0
    """longer side over shorter side"""

    max_image_batch: Count = 32
    """pictures the model takes at once"""
    max_text_batch: Count = 128
    """texts the model takes at once"""
    decode_threads: Count = Field(default_factory=lambda: min(8, count_processors()))
    """threads that decode pictures"""
    search_threads: Count = 4
    """threads that search and write collections"""
    max_cached_labels: Count = 50_000
    """labels whose class vectors are kept, over all classifiers, as bytes: long names count for
    more"""
    text_cache_bytes: CountOrZero = 64 * 2**20
    """memory for the vectors of texts seen before; 0 keeps none"""
    image_cache_bytes: CountOrZero = 64 * 2**20
    """memory for the vectors of pictures seen before; 0 keeps none"""

    max_batch_s: Seconds = 120.0
    """a batch, or a picture's decoding, that takes longer hangs: its thread is left behind, its
    items get 500, and another thread takes over"""
    body_timeout_s: Seconds = 60.0
    """a body that takes longer to arrive gets 408; a connection that waits as long without a whole
    request is closed"""
    request_timeout_s: Seconds = 60.0
    """a request that takes longer to answer gets 504, and its work is dropped, but for a write
    that has begun; a client may ask for less with the header X-Request-Timeout"""
    ready_timeout_s: Seconds = 5.0
    """/health/ready is 503 when its canary takes longer"""
    shutdown_timeout_s: Seconds = 10.0
    """running requests may take this long after SIGTERM"""
    log_format: Literal["text", "json"] = "text"
    """json: one object a line"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        largest = max(self.max_items, self.max_text_batch)
        if self.max_queue_items < largest:
            raise ValueError(
                f"max_queue_items {self.max_queue_items} must be at least {largest}, the largest of"
                " max_items and max_text_batch, or such a request would never fit"
            )
        return self

    @property
    def image_limits(self) -> ImageLimits:
        """What a picture from a client may cost."""
        return ImageLimits(self.max_image_bytes, self.max_image_pixels, self.max_image_aspect)


def load_settings(**given: Any) -> Settings:
    """Settings from the environment; arguments that are not None win. Raises ConfigError."""
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item) for item in error.errors())) from None


def wants_tracing() -> bool:
    """Whether variables of OpenTelemetry are set, which its own SDK reads."""
    return any(name.startswith("OTEL_") for name in os.environ)


def _explain(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if not name:  # of several settings together
        return str(item["msg"]).removeprefix("Value error, ")
    text = f"{name} {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"
    if name == "port" and str(item["input"]).startswith("tcp://"):
        # Kubernetes injects NAME_PORT=tcp://... for a Service called NAME.
        text += "; Kubernetes sets CLIPSERVE_PORT itself: use enableServiceLinks: false, or --port"
    return text
