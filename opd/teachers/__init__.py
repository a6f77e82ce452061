"""Teachers: models that score a student's rollout on the same audio, and can transcribe."""

from opd.teachers.base import Teacher, make_teacher

__all__ = ["Teacher", "make_teacher"]
