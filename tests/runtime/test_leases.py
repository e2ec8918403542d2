"""What inferences wait for is held, by name, as long as one of them does."""

import pytest

from runtime.leases import Leases


def test_a_model_is_held_until_the_last_lease_of_it_ends() -> None:
    leases = Leases()
    assert not leases.held("m")
    with leases.hold("m"):
        with leases.hold("m"), leases.hold("other"):
            assert leases.held("m")
            assert leases.held("other")
        assert leases.held("m")
        assert not leases.held("other")
    assert not leases.held("m")


def test_a_lease_ends_however_the_inference_does() -> None:
    leases = Leases()
    with pytest.raises(KeyboardInterrupt), leases.hold("m"):
        raise KeyboardInterrupt
    assert not leases.held("m")


def test_the_end_of_the_last_lease_of_a_model_is_told() -> None:
    leases, ended = Leases(), list[str]()
    leases.on_end = lambda: ended.append("end")
    with leases.hold("m"):
        with leases.hold("m"), leases.hold("n"):
            assert set(leases.models) == {"m", "n"}
        assert ended == ["end"]
    assert ended == ["end", "end"]
    assert not leases.models
