"""What ``import neuron_ext`` brings, and what it leaves until it is asked for."""

import pytest
from helpers import run_python

import neuron_ext


def test_the_compiler_is_imported_when_trace_is_asked_for():
    code = """
        import sys
        import neuron_ext

        def compilers():
            return [name for name in sys.modules if name.startswith("neuron_ext.compiler")]

        assert compilers() == [], compilers()
        assert "trace" in dir(neuron_ext)
        assert compilers() == [], compilers()
        from neuron_ext import trace
        assert trace is neuron_ext.trace
        assert compilers() != []
        assert "torch._inductor" not in sys.modules, "which takes seconds"
    """
    run_python(code)


def test_everything_that_is_promised_is_there():
    for name in neuron_ext.__all__:
        assert getattr(neuron_ext, name) is not None
    assert set(neuron_ext.__all__) <= set(dir(neuron_ext))
    with pytest.raises(AttributeError, match="module 'neuron_ext' has no attribute 'trance'"):
        _ = neuron_ext.trance
