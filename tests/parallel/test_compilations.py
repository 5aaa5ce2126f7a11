import jax
import jax.numpy as jnp

from p2r_jax.parallel.compilations import Compilations


def test_each_shape_of_a_program_counts_once():
    program = jax.jit(lambda x: x * 2 + 1)
    sizes = [jnp.zeros(n) for n in (3, 5)]
    compiled = Compilations()
    for x in (sizes[0], sizes[0], sizes[1], sizes[0]):
        program(x)
    assert compiled.count == 2
    assert compiled.seconds > 0
    compiled.close()
    program(jnp.zeros(7))
    assert compiled.count == 2
