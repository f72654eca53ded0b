"""Seeds are a function of names."""

from splitlearn.seeds import derive


def test_names_give_seeds_that_torch_takes_and_that_differ():
    names = [(seed, what, i) for seed in (0, 1) for what in ("weights", "order") for i in range(50)]
    seeds = [derive(*each) for each in names]
    assert len(set(seeds)) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [derive(*each) for each in names]


def test_neither_the_order_nor_the_borders_of_names_are_lost():
    assert len({derive(0, "ab", "c"), derive(0, "a", "bc"), derive(0, "c", "ab"), derive(0, 1, 2), derive(0, 12)}) == 5
