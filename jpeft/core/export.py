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
        tensors: for each kind of site, `{tensor name after the module's: (field, letters in torch's order)}`. The
            letter `i` or `o` stands for merged inputs or outputs; of a convolution `i` is several axes, (channels,
            *window), and `(i)` is them merged. A letter that the field does not have is an axis of size one; `w` stands
            for as many of them as the convolution's window has axes. The field `base` is a leaf that trains as it is. A
            field that is None has no tensor.
        config: `{PEFT's field: the method's field}`, or `(field, value)` for a flag of PEFT's that says whether the
            field has that value.
        patterns: `{PEFT's field: (the method's field of {regex: value}, its field of what holds elsewhere)}`.
        modules: `{PEFT's field, a list of modules: (the method's field of targets, a Weight's field, a letter)}`;
            listed are the modules whose field has that letter.
        fixed: `{PEFT's field: value}` that are always written, and that a folder must have to be read as this method;
            one that is in `neutral` too may have those values instead.
        neutral: `{PEFT's field: values}` that a folder may have besides, as they change nothing that the adapter
            computes (how it started, how it trained); any value where empty. A field of PEFT's that nothing here names
            must be off: false, null, empty or zero.
        required: `{the method's field: value}`: PEFT computes the method with that value only.
        tied: whether PEFT's adapter of an embedding reaches the head that shares its weight, as ours does.
        shared: as one entry of `tensors`, for arrays that the method keeps once: `{whole tensor name: (name,
            letters)}`.
        whole: in place of `tensors`, for what PEFT keeps apart from the modules: `{tensor: fields}`. One field of one
            leaf is the tensor; of several, all leaves' and layers' lie side by side behind their common first axis.
        reads: other peft_types whose files hold the same.
        enclosing: whether the tensors belong to the module around the leaf's (an attention, not its query projection),
            and to the last layers of a stack where the field has fewer than the leaf. PEFT knows these modules itself.
    """

    peft_type: str
    tensors: Mapping[str, Mapping[str, tuple[str, str]]] = field(default_factory=dict)
    config: Mapping[str, str | tuple[str, Any]] = field(default_factory=dict)
    patterns: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    modules: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, tuple] = field(default_factory=dict)
    required: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    whole: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    enclosing: bool = False
    tied: bool = False
