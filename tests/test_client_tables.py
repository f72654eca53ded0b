"""The two tables of 2018 as the meters make them: by literal values, and by hand."""

import runpy
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def load(name: str) -> dict:
    return runpy.run_path(str(EXPERIMENTS / name / "table.py"))


@pytest.fixture(scope="module")
def compute() -> dict:
    return load("client_compute")


@pytest.fixture(scope="module")
def vgg(compute):
    return compute["make_network"]()


@pytest.fixture(scope="module")
def bandwidth() -> dict:
    return load("client_bandwidth")


@pytest.fixture(scope="module")
def resnet(bandwidth):
    return bandwidth["on_cifar100"]()


@pytest.fixture(scope="module")
def tutorial(bandwidth):
    return bandwidth["on_mnist"]()


def cells(table: str, start: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_vgg_has_the_multiply_adds_of_the_paper(compute, vgg):
    bottom, whole = compute["cost_of_image"](vgg)
    assert bottom.forward == 2 * 1_769_472 == 2 * (32 * 32 * 64 * 3 * 9)
    assert whole.forward == 2 * 336_166_912
    # Backward each layer computes two gradients, and the first convolution one.
    assert bottom.backward == bottom.forward
    assert whole.backward == 2 * whole.forward - bottom.forward
    assert compute["count_relus"](vgg) == 336_451_584 - 336_166_912
    assert {value.device.type for value in vgg.state_dict().values()} == {"meta"}


def test_the_compute_table_is_the_published_one(compute, vgg):
    table = compute["published_rule"](vgg)
    assert cells(table, "Large-batch SGD") == ["336,451,584", "29.4", "29.4", "5.89", "5.89"]
    assert cells(table, "Federated learning") == ["336,451,584", "29.4", "29.4", "5.89", "5.89"]
    assert cells(table, "SplitNN") == ["1,769,472", "0.1548", "0.1548", "0.03", "0.03"]


def test_a_clients_share_by_hand(compute):
    assert compute["tera"](1_769_472, 100) == pytest.approx(1_769_472 * 175 * 500 / 1e12)
    assert compute["tera"](1_769_472, 500, 6.4) == pytest.approx(1_769_472 * 6.4 * 100 / 1e12)


def test_the_true_cost_is_told_beside_it(compute, vgg):
    table = compute["true_cost"](vgg)
    whole = ["672,333,824", "1,341,128,704"]
    assert cells(table, "Large-batch SGD, federated learning") == ["175", *whole, "176.2", "35.24"]
    assert cells(table, "SplitNN") == ["175", "3,538,944", "3,538,944", "0.6193", "0.1239"]
    assert cells(table, "the two baselines as far as the figure shows them") == ["6.4", *whole, "6.443", "1.289"]


def test_what_crosses_behind_the_first_convolution(compute, vgg):
    told = compute["what_crosses"](vgg)
    assert f"{2 * 64 * 32 * 32 * 4:,} bytes per image" in told  # 524,288
    assert "42.7 GiB per client of 100 and 8.5 GiB per client of 500" in told


def test_resnet_sends_what_the_paper_says(resnet):
    parameters, statistics = 23_712_932 * 4, 53_120 * 4 + 53 * 8
    stem = (64 * 3 * 49 + 2 * 64) * 4 + 2 * 64 * 4 + 8
    assert resnet.of_row == 2 * 16_384 * 4
    assert resnet.of_turn == {"peer": stem, "server": 2 * stem}
    assert resnet.of_round == resnet.of_step == 2 * (parameters + statistics)


def test_the_bandwidth_table_has_the_published_row(bandwidth, resnet):
    table = bandwidth["splitnn_table"](resnet)
    assert cells(table, "100") == ["6", "6", "6.1035 (6.1071)"]
    assert cells(table, "500") == ["1.2", "1.2", "1.2207 (1.2243)"]


def test_the_baselines_are_told_with_the_rounds_they_need(bandwidth, resnet):
    table = bandwidth["baselines_table"](resnet)
    federated = ["190,129,264", "3", "16.9 rounds", "2.4", "13.6 rounds"]
    assert cells(table, "Federated learning") == federated
    assert cells(table, "Large-batch SGD") == ["190,129,264", "13", "73.4 steps", "14", "79.1 steps"]
    assert "are 17.7 GiB" in table


def test_the_tutorials_network_breaks_even_far_apart_by_who_hands_on(tutorial):
    bottom, head = 784 * 128 + 128 + 128 * 640 + 640, 640 * 10 + 10
    assert tutorial == (60_000, 2 * 640 * 4, {"peer": 4 * bottom, "server": 8 * bottom}, *[8 * (bottom + head)] * 2)
    assert (tutorial.break_even("peer"), tutorial.break_even("server")) == (393, 5_991)


@pytest.mark.parametrize("handoff", ["peer", "server"])
@pytest.mark.parametrize("name", ["resnet", "tutorial"])
def test_break_even_is_where_the_curves_cross(name, handoff, request):
    traffic = request.getfixturevalue(name)
    least = traffic.break_even(handoff)
    assert traffic.split(least, handoff) < traffic.of_round <= traffic.split(least - 1, handoff)


def test_resnet_breaks_even_with_35_clients(bandwidth, resnet, tutorial):
    table = bandwidth["break_even_table"]({"ResNet-50": resnet, "tutorial": tutorial})
    assert cells(table, "ResNet-50") == ["131,072", "38,664", "77,328", "190,129,264", "35", "35"]


@pytest.mark.parametrize("name", ["client_compute", "client_bandwidth"])
def test_what_is_kept_is_what_is_made(name, request):
    """The README and the figure show results/; here they are made anew."""
    made = load(name)
    kept = (EXPERIMENTS / name / "results" / "table.md").read_text()
    if name == "client_compute":
        vgg = request.getfixturevalue("vgg")
        parts = [made[part](vgg) for part in ("published_rule", "true_cost", "what_crosses")]
    else:
        networks = {
            "ResNet-50": request.getfixturevalue("resnet"),
            "784-128-640-10": request.getfixturevalue("tutorial"),
        }
        parts = [made[part](networks["ResNet-50"]) for part in ("splitnn_table", "baselines_table")]
        parts.append(made["break_even_table"](networks))
    assert kept == "\n".join(parts)
