"""Factored: what a subclass must define."""

import pytest

from jpeft.core.factored import Factored


def test_without_factors_it_says_so():
    with pytest.raises(TypeError, match="Factored defines no factors"):
        Factored().factors()
