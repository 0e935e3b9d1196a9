"""Export: how HF PEFT's adapter folder writes a method, as data on the method's class.

PEFT stores one tensor per module, torch's axes in torch's order, layers apart. Here a tensor is a field of the method's
Weight with its trailing axes permuted: the field's letters (`Weight.FIELDS`) in torch's order say all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Export"]


@dataclass(frozen=True)
class Export:
    """
    Attributes:
        peft_type: PEFT's name of the method, `adapter_config.json`'s `peft_type`.
        tensors: for each kind of site, `{tensor name after the module's: (field, letters in torch's order)}`. The letter
            `i` or `o` stands for merged inputs or outputs; of a convolution's window and channels torch's order is
            (channels, *window). A letter that the field does not have is an axis of size one.
        config: `{PEFT's field: the method's field}`.
        fixed: `{PEFT's field: value}` that are always written, and that a folder must have to be read as this method.
        shared: as one entry of `tensors`, for arrays that the method keeps once: `{whole tensor name: (name, letters)}`.
    """

    peft_type: str
    tensors: Mapping[str, Mapping[str, tuple[str, str]]]
    config: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, tuple[str, str]] = field(default_factory=dict)
