"""What every loss between a student and its teacher asks of its arguments."""

from torch import Tensor


def check_pair(student: Tensor, teacher: Tensor, temperature: float) -> None:
    """Logits of one shape and a temperature that divides.

    Raises:
        ValueError: the shapes differ or the temperature is not positive.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher logits must have one shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}."
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}.")


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """A class for each row of logits, of at least two.

    Raises:
        ValueError: other shapes, numbers that are not whole, or a class that is not there.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be (N, C) with C >= 2, got {tuple(logits.shape)}.")
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be {len(logits)} whole numbers, got {tuple(labels.shape)} of "
            f"{labels.dtype}."
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(
            f"labels must be in 0..{logits.shape[1] - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}."
        )


def check_features(student: Tensor, teacher: Tensor, compares: str) -> None:
    """Outputs of two layers, equal in the dims that a feature loss compares.

    Args:
        student: (N, ...).
        teacher: (N, ...).
        compares: all, positions or images, see `kinds.feature_loss`.

    Raises:
        ValueError: they cannot be compared; says the rule and both shapes.
    """
    rule = misfit(tuple(student.shape), tuple(teacher.shape), compares)
    if rule is not None:
        raise ValueError(
            f"{rule}, got {tuple(student.shape)} of the student and {tuple(teacher.shape)} of "
            "the teacher."
        )


def misfit(student: tuple[int, ...], teacher: tuple[int, ...], compares: str) -> str | None:
    """The rule that two shapes break, or None.

    >>> misfit((2, 8, 4, 4), (2, 16, 4, 4), "positions") is None
    True
    """
    if compares == "all":
        return None if student == teacher else "what is compared must have one shape"
    if compares == "positions":
        if len(student) < 3 or len(teacher) < 3:
            return "attention needs channels and positions, (N, C, H, W) or (N, C, L)"
        same = student[:1] + student[2:] == teacher[:1] + teacher[2:]
        return None if same else "what is compared must have one height and width"
    same = len(student) > 1 and len(teacher) > 1 and student[0] == teacher[0]
    return None if same else "what is compared must be features, (N, ...), of the same images"
