"""Other optimizers than AdamW: what `build_optimizer` may return, and what a checkpoint holds of its state."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.checkpoints import fit_manifest, rewrite
from support.fault_points import disturb
from support.runs import assert_same_run

from mygpt.checks.trace import trace_step
from mygpt.errors import DamagedCheckpointError, MismatchError, MygptError, NonFiniteError
from mygpt.runs.run import RunDirectory
from mygpt.training import parts
from mygpt.training.train import train


class Own(torch.optim.Optimizer):
    """Momentum of matrices alone, with every kind of value that a checkpoint can hold, each of which counts."""

    def __init__(self, params, keeps=None):
        super().__init__(params, {"lr": 1.0, "steps": 0, "keeps": None})
        self.keeps = keeps

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["steps"] += 1
            for parameter in (parameter for parameter in group["params"] if parameter.dim() > 1):
                state = self.state[parameter]
                if not state:
                    state |= {
                        "count": 0,
                        "scale": 1.0,
                        "flips": False,
                        "step": torch.tensor(0),
                        "half": parameter.half(),
                    }
                    state["turned"] = torch.zeros_like(parameter).t()
                    state["by row.double"] = parameter.new_zeros(len(parameter), 1, dtype=torch.float64)
                    if self.keeps is not None:
                        state["kept"] = self.keeps
                state["count"] += 1
                state["scale"] *= 0.9
                state["flips"] = not state["flips"]
                state["step"] += 1
                state["turned"].lerp_(parameter.grad.t(), 0.1)
                state["by row.double"] += parameter.grad.double().square().mean(1, keepdim=True)
                state["half"].mul_(0.9)
                # A Python number and a tensor of a step do not divide to the same bits.
                sign = 1 if state["flips"] else 0.5
                rate = group["lr"] * sign * state["scale"] / (state["count"] + 1 / state["step"] + group["steps"])
                update = state["turned"].t() / (state["by row.double"].sqrt() + 1e-8) + state["half"].float()
                parameter.sub_((rate * update).float())


OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "momentum": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "fused momentum": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9, fused=True),
    "adagrad": torch.optim.Adagrad,
    "adafactor": torch.optim.Adafactor,
    "nadam": torch.optim.NAdam,
    "rmsprop": lambda params, lr: torch.optim.RMSprop(params, lr=lr, momentum=0.5, centered=True),
    "asgd": torch.optim.ASGD,
    "amsgrad": lambda params, lr: torch.optim.AdamW(params, lr=lr, amsgrad=True),
    "own": lambda params, lr: Own(params),
}


@pytest.fixture
def use(monkeypatch):
    """A function that puts another optimizer in the place of AdamW."""

    def choose(make):
        monkeypatch.setattr(parts, "build_optimizer", lambda model, table: make(model.parameters(), lr=1.0))

    return choose


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stopped_run_of_any_optimizer_continues_to_the_same_bytes(use, tiny, tmp_path, name):
    """Stopping at step 3 changes no bit of weights, state or records at step 6."""
    use(OPTIMIZERS[name])
    keys = {"reduction": "exact"} if name == "own" else {}
    whole = train(tiny(output=str(tmp_path / "whole"), **keys))
    train(tiny(**keys), last_step=3)
    assert_same_run(train(tiny(**keys)), whole)


def test_metadata_of_adamw_are_as_ever(tiny):
    """The state of AdamW has the tensors of earlier versions, and no metadata that these do not know."""
    state = train(tiny()) / "step-000006" / "state.safetensors"
    with safe_open(state, framework="numpy") as tensors:
        metadata = json.loads(tensors.metadata()["mygpt"])
        moments = {name.rpartition(".")[2] for name in tensors.keys() if name.startswith("optimizer.")}  # noqa: SIM118
    assert metadata.keys() == {"format", "step", "processes"}
    assert moments == {"exp_avg", "exp_avg_sq", "step"}


@pytest.mark.parametrize("name", ["sgd", "fused momentum", "rmsprop"])
@pytest.mark.parametrize("step", [1, 5])
def test_non_finite_step_updates_nothing_with_any_optimizer(use, tiny, monkeypatch, name, step):
    """Also where the host reads its numbers late: the weights that are kept are those before the step."""
    use(OPTIMIZERS[name])
    before = {}

    def infinite_loss(built, *_):
        built.gpt.norm.weight.data[3] = float("nan")
        before.update({name: weight.clone() for name, weight in built.gpt.state_dict().items()})

    with monkeypatch.context() as patch:
        disturb("before-step", infinite_loss, count=step, patch=patch.setattr)
        with pytest.raises(NonFiniteError, match=f"step {step}: the loss is nan.*; not updated"):
            train(tiny(log_every=1000, save_every=6))
    kept = load_file(tiny().checkpoint.output + f"/failed-step-{step:06d}/model.safetensors")
    assert all(torch.equal(kept[name].nan_to_num(), weight.nan_to_num()) for name, weight in before.items())


@pytest.mark.parametrize(
    ("keeps", "kind"), [([1.0], "list"), ("text", "str"), (torch.zeros(2, dtype=torch.bfloat16), "torch.bfloat16")]
)
def test_state_that_cannot_be_saved_is_refused_at_the_first_step(use, tiny, keeps, kind):
    """One line that names it, and not after all steps of the run."""
    use(lambda params, lr: Own(params, keeps))
    with pytest.raises(MygptError) as caught:
        train(tiny())
    assert str(caught.value) == (
        f"Own: keeps optimizer.token_embedding.weight.kept ({kind}), which a checkpoint cannot hold; expected "
        "numbers and tensors of parameters and of groups"
    )


def test_another_optimizer_does_not_continue_a_run(use, tiny):
    """Neither AdamW after SGD, nor SGD after AdamW: one line names both."""
    train(tiny(), last_step=3)
    use(torch.optim.SGD)
    with pytest.raises(MismatchError, match="was trained with AdamW, and this mygpt trains with SGD; use the version"):
        train(tiny())
    train(tiny(), overwrite=True)
    use(torch.optim.AdamW)
    with pytest.raises(MismatchError, match="was trained with SGD, and this mygpt trains with AdamW"):
        train(tiny(steps=9))


@pytest.mark.parametrize(
    "damage",
    [
        {"tensors": lambda values: values.pop("optimizer.norm.weight.square_avg")},
        {"tensors": lambda values: values.pop("optimizer.norm.weight.step")},
        {"metadata": lambda values: values["optimizer"]["kinds"].pop("optimizer.norm.weight.square_avg")},
        {"metadata": lambda values: values["optimizer"]["kinds"].update({"optimizer.norm.weight.step": "int"})},
        {"metadata": lambda values: values["optimizer"]["kinds"].update({"optimizer.norm.weight.more": "tensor"})},
        {"metadata": lambda values: values["optimizer"]["kinds"].update({"optimizer.norm.weight.step": "list"})},
        {
            "metadata": lambda values: values["optimizer"]["kinds"].update({"optimizer.more.step": "tensor"}),
            "tensors": lambda values: values.update({"optimizer.more.step": torch.zeros(())}),
        },
    ],
)
def test_damaged_state_of_any_optimizer_is_an_error(use, tiny, damage):
    """Also where sizes and hashes are right: a value that is missing, another's, or of another kind."""
    use(OPTIMIZERS["rmsprop"])
    file = train(tiny(), last_step=3) / "step-000003" / "state.safetensors"
    rewrite(file, **damage)
    fit_manifest(file)
    with pytest.raises(DamagedCheckpointError, match=r"damaged: .*(norm|more)"):
        train(tiny())


def test_numbers_in_the_state_are_seen_when_a_step_is_traced(use, tiny):
    """What `mygpt bisect` compares includes what an optimizer counts."""
    use(OPTIMIZERS["own"])
    run = train(tiny(save_every=3, keep_last=0))
    traced, kept = trace_step(RunDirectory(run), 4, run / "step-000003", "count of token_embedding.weight, updated")
    assert kept == torch.tensor(4)
    assert "scale of token_embedding.weight, updated" in dict(traced.values)
