"""What all sections of a configuration share: strict, frozen models, and the kinds of numbers."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: immutable, strict about unknown keys and about types (no "3" for 3)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
