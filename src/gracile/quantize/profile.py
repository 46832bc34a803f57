"""What a runtime computes in integers and how it wants numbers stored: data, a file per runtime."""

from importlib import resources

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gracile.core.plan import Plan
from gracile.errors import UserError, nearest

KERNELS_OF = {"executorch": "xnnpack"}  # runtimes whose kernels are those of a library


class Grid(BaseModel):
    """An integer format: how a profile wants activations or weights stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int = Field(default=8, ge=2, le=16)
    signed: bool = False
    symmetric: bool = False
    axis: int | None = None
    narrow: bool = False


class Profile(BaseModel):
    """What one runtime computes in integers, as measured; a file in `quantize/profiles`.

    Attributes:
        activations: format of activations that may be negative. Those that cannot be get zero
            point 0 on an unsigned grid, unless this is signed and asymmetric.
        unsigned: whether kernels take unsigned activations at all.
        weights: format of weights; `axis: null` is per tensor, any number per output channel.
        quantize_inputs: put a quantizer on the model's inputs.
        quantize_outputs: put one on what the model returns.
        quantize_results: put one behind every integer operator; otherwise only on what they read,
            and results are float until the next of them.
        quantize_steps: put quantizers on all parts of recurrent steps that are taken apart, gates
            and cell states too; otherwise only on what their products read.
        sums_in_accumulator: a convolution adds the other operand of a following addition to its
            unrounded sums, so that no quantizer stands between the two.
        ops_integer: operators with integer kernels.
        ops_same_scale: operators that move values: inputs and output share one scale.
        ops_dynamic: operators with a kernel that quantizes what it reads as it runs and is faster
            than float.
        notes: per operator, the measured reason.
        notes_dynamic: per operator without such a kernel, the measured reason.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    activations: Grid
    weights: Grid
    unsigned: bool = True
    quantize_inputs: bool = True
    quantize_outputs: bool = False
    quantize_results: bool = True
    quantize_steps: bool = False
    sums_in_accumulator: bool = False
    ops_integer: tuple[str, ...]
    ops_same_scale: tuple[str, ...] = ()
    ops_dynamic: tuple[str, ...] = ()
    notes: dict[str, str] = Field(default_factory=dict)
    notes_dynamic: dict[str, str] = Field(default_factory=dict)

    @property
    def dynamic(self) -> "Profile":
        """The same runtime, where nothing but `ops_dynamic` is asked for."""
        return self.model_copy(
            update={"ops_integer": self.ops_dynamic, "notes": self.notes_dynamic}
        )


def load_profile(name: str) -> Profile:
    """Read a profile by name; that of a runtime is also that of the library it computes with.

    Raises:
        UserError: no such profile, or the file breaks the schema.
    """
    name = KERNELS_OF.get(name, name)
    folder = resources.files("gracile.quantize.profiles")
    known = sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))
    if name not in known:
        raise UserError(f"no quantization profile '{name}'.{nearest(name, known)}")
    data = yaml.safe_load((folder / f"{name}.yaml").read_text())
    try:
        return Profile.model_validate({"name": name, **data})
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        raise UserError(f"profile '{name}': {place}: {first['msg']}.") from None


def dynamic_warning(plan: Plan, runtime: str) -> str | None:
    """A warning where a plan's ranges are found at run time and this runtime gains nothing by it.

    Args:
        plan: its Bits edits are looked at.
        runtime: name of one with a profile.
    """
    if not any(e.dynamic for e in plan.of_kind("bits")):
        return None
    profile = load_profile(runtime)
    if profile.ops_dynamic:
        return None
    why = profile.notes_dynamic.get("linear", "it has no kernel for it")
    return (
        f"layers with ranges found at run time are right here but not faster: {why}. "
        "quantize: ptq is."
    )
