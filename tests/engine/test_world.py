"""A whole run on the tiny model: what moves, what stays, what is the same twice."""

import torch


def test_open(open_tiny):
    world = open_tiny()
    from sdkit.engine.gather import gather
    from sdkit.engine.step import train_step

    g = gather(world, world.data.take(0), ("rollout", 0))
    m = train_step(world, g.batch)
    print(m)
    assert m.metrics["grad_norm"] > 0
