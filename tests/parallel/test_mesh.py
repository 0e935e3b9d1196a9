import jax
import pytest
from jax.sharding import AxisType

from jpeft.parallel import make_mesh, parse_mesh


def test_a_mesh_has_all_axes_in_their_order():
    mesh = make_mesh("tensor=2,fsdp=4")
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert set(make_mesh({"data": 8}, axis_type=AxisType.Explicit).axis_types) == {AxisType.Explicit}
    assert make_mesh().shape["fsdp"] == 8
    assert make_mesh("data=2", devices=jax.devices()[:2]).size == 2


@pytest.mark.parametrize("text", ["fsdp", "fsdp=", "fsdp=8,fsdp=8", "fsdp=-1", "fsdp=8;data=1", "8"])
def test_a_mesh_that_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError, match="expected a mesh as 'fsdp=8,tensor=2'"):
        parse_mesh(text)


def test_other_axes_sizes_and_numbers_of_devices_are_refused():
    with pytest.raises(ValueError, match=r"among data, fsdp, tensor, got 'model'"):
        make_mesh("model=8")
    with pytest.raises(ValueError, match="a positive size for each mesh axis, got fsdp=0"):
        make_mesh({"fsdp": 0})
    with pytest.raises(ValueError, match=r"8 devices, got fsdp=3,tensor=2, which has 6; write for example 'fsdp=8'"):
        make_mesh("fsdp=3,tensor=2")
