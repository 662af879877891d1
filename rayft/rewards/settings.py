"""``scoring:``, all that a run is told about where and how rewards are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from rayft.rewards.worker import Limits
from rayft.settings import NUMBER, STRICT, Count, CountOrZero, NonNegative, Positive

FailedShare = Annotated[float, NUMBER, Field(ge=0, le=1)]
RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")  # resources that have settings of their own, or none


@dataclass(frozen=True)
class Placement:
    """Where rewards are computed."""

    actors: CountOrZero = 0
    """Reward actors; 0 scores beside the driver, right for rewards that cost microseconds."""
    min_actors: CountOrZero | None = None
    """Fewest actors of an elastic pool, which grows to ``actors`` while there is work for them; fixed otherwise."""
    num_cpus_per_actor: NonNegative = 1.0
    """Logical CPUs each reserves."""
    num_gpus_per_actor: NonNegative = 0.0
    """GPU fraction each reserves; a reward may ask for its own with ``num_gpus``. GPU rewards run without a child."""
    resources: dict[str, Positive] | None = None
    """What else each reserves, pay-off actors too: ``{reward: 1}`` keeps them on nodes that were given ``reward``."""
    isolate: bool = True
    """Rewards run in a child process, which may crash, hang or leak. Off, only exceptions are survived."""

    def reserved(self, gpus: float) -> dict[str, float]:
        """Resource -> how much one actor asks for, with this fraction of a GPU."""
        return {"CPU": self.num_cpus_per_actor, "GPU": gpus, **(self.resources or {})}


@dataclass(frozen=True)
class ScoringSettings(Placement):
    """Where rewards are computed, what they may take, and what becomes of samples they fail on."""

    __pydantic_config__ = STRICT

    timeout: Positive = Limits.timeout
    """Seconds for one sample; what takes longer is stopped and has failed."""
    startup_timeout: Positive = Limits.startup
    """Seconds to import and build the rewards."""
    memory_gb: Positive | None = Limits.memory_gb
    """What scoring may take beyond what building the rewards took; no limit where none is given."""
    retries: CountOrZero = Limits.retries
    """Further attempts for a sample on which the reward raised, crashed or timed out."""
    on_failure: Literal["drop", "floor"] = "drop"
    """drop: a failed sample enters no statistic and no loss; floor: it counts as ``floor``."""
    floor: float | None = None
    """The value of a failed sample, with ``on_failure: floor``."""
    max_failed: FailedShare = 0.5
    """Share of one call's samples that may fail; more stop the run. 0 stops it at the first failure."""
    max_reward_calls: Count | None = None
    """Calls that all of the run may pay, evaluation included; it ends cleanly before it would pay more."""
    cache: str | None = None
    """File of scores that outlive the run and are shared by a sweep; ``memory`` for this run only."""
    cache_mb: Positive = 1024.0
    """Size at which the least recently used scores make room."""
    micro_batches: Count = 1
    """Pieces an iteration is drawn in: while one is scored the next is drawn, with the same weights."""
    staleness: Literal[0, 1] = 0
    """1: the next iteration is drawn while this one is scored and learnt, so with weights one update old. A resumed run
    draws it anew."""
    undecodable: float | None = None
    """Value of an event that decodes to nothing; the reward's own where none is given."""

    def __post_init__(self) -> None:
        if (self.on_failure == "floor") != (self.floor is not None):
            raise ValueError("on_failure: floor and a number for floor go together; give both or neither")
        for name in set(self.resources or {}) & set(RAYS_OWN):
            raise ValueError(f"resources names {name}; it is for custom ones, beside num_cpus_ and num_gpus_per_actor")
        if self.min_actors is not None and self.min_actors > self.actors:
            raise ValueError(f"min_actors is {self.min_actors}, more than actors = {self.actors}")
