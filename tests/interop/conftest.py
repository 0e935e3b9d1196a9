"""Models that adapters of HF PEFT are read for and written from."""

import pytest
from peft_folders import CONFIG, TOKENS
from small_models import make_model
from tiny_decoders import random_model

import jpeft
from jpeft import models


@pytest.fixture(scope="module")
def llama():
    """`(apply, params, sites)` of a stacked decoder that shares no weight."""
    apply, params = random_model(CONFIG)
    return apply, params, jpeft.find_sites(apply, params, TOKENS)


@pytest.fixture(scope="module")
def unrolled():
    model = make_model("linen-unrolled")
    return model.apply, model.params, model.sites


@pytest.fixture(scope="module")
def base(tmp_path_factory, llama):
    folder = tmp_path_factory.mktemp("base") / "model"
    models.save(folder, llama[1], CONFIG)
    return folder
