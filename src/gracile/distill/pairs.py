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
