"""DeepSpeed against a plain torch loop: accumulation, clipping, masters, skipping of bad gradients."""

import subprocess
import sys

import pytest
import torch
from attrs import evolve
from torch import nn

from sdkit.language.specs import OptimizerSpec

OPTIMIZER = OptimizerSpec(lr=1e-2, max_grad_norm=0.5)


class Net(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)

    def forward(self, x, y, share):
        return ((self.layers(x) - y).float().square().sum() * share, {})


def batches(dtype, steps=3):
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(12, 8, generator=draw).to(dtype), torch.randn(12, 4, generator=draw).to(dtype))
        for _ in range(steps)
    ]


def train_with_deepspeed(stage, dtype, sizes):
    """Masters and gradient norms of three steps; each step has micro-batches of these sizes."""
    from sdkit.distributed.zero import Zero

    engine = Zero(Net(dtype), OPTIMIZER, stage, dtype == torch.bfloat16)
    norms = []
    for x, y in batches(dtype):
        for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
            loss, _ = engine.forward(a, b, 1 / 48)
            engine.backward(loss)
        norms.append(engine.step(OPTIMIZER.lr).grad_norm)
    masters = torch.cat([value.flatten().clone() for _, value in engine.masters()])
    engine.close()
    return masters, norms


def train_with_torch():
    net = Net(torch.float32)
    adam = torch.optim.AdamW(net.parameters(), lr=OPTIMIZER.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    norms = []
    for x, y in batches(torch.float32):
        net(x, y, 1 / 48)[0].backward()
        norms.append(nn.utils.clip_grad_norm_(net.parameters(), OPTIMIZER.max_grad_norm).item())
        adam.step()
        adam.zero_grad()
    return torch.cat([p.detach().flatten() for p in net.parameters()]), norms


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("sizes", [[12], [3, 4, 5], [1, 11]])
def test_micro_batches_give_the_weights_of_plain_torch(process_group, stage, sizes):
    masters, norms = train_with_deepspeed(stage, torch.float32, sizes)
    expected, expected_norms = train_with_torch()
    torch.testing.assert_close(masters, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected_norms), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_bfloat16_keeps_float32_masters_and_accumulates_in_float32(process_group, stage):
    unsplit, _ = train_with_deepspeed(stage, torch.bfloat16, [12])
    split, _ = train_with_deepspeed(stage, torch.bfloat16, [3, 4, 5])
    assert unsplit.dtype == torch.float32
    assert (unsplit - split).abs().mean() < 1e-3
    assert (unsplit != unsplit.bfloat16().float()).any(), "masters are finer than bfloat16"


def test_stage_0_in_bfloat16_is_refused(process_group):
    from sdkit.distributed.zero import Zero

    with pytest.raises(ValueError, match="must run as stage 1"):
        Zero(Net(torch.bfloat16), OPTIMIZER, 0, True)


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, torch.float32), (1, torch.float32), (1, torch.bfloat16), (2, torch.bfloat16)]
)
def test_bad_gradient_skips_only_its_step(process_group, stage, dtype):
    from sdkit.distributed.zero import Zero

    engine = Zero(Net(dtype), OPTIMIZER, stage, dtype == torch.bfloat16)
    before = torch.cat([value.flatten().clone() for _, value in engine.masters()])
    x, y = batches(dtype, 1)[0]
    loss, _ = engine.forward(x, y, float("nan"))
    engine.backward(loss)
    assert not engine.step(1e-2).applied
    after = torch.cat([value.flatten().clone() for _, value in engine.masters()])
    torch.testing.assert_close(after, before, atol=0, rtol=0)
    loss, _ = engine.forward(x, y, 1 / 48)
    engine.backward(loss)
    result = engine.step(1e-2)
    assert result.applied
    assert result.grad_norm > 0
    moved = torch.cat([value.flatten().clone() for _, value in engine.masters()])
    assert (moved != before).any()
    engine.close()


DECAY = OptimizerSpec(lr=1e-2, max_grad_norm=0.5, weight_decay=2.0)


class Normed(Net):
    """`Net` followed by a layer norm."""

    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        self.layers.append(nn.LayerNorm(4))

    @property
    def decayed(self):
        return [self.layers[0].weight, self.layers[2].weight]


def train_decayed_with_torch(optimizer):
    net = Normed()
    decayed = net.decayed if optimizer.decay == "weights" else list(net.parameters())
    rest = [p for p in net.parameters() if all(p is not chosen for chosen in decayed)]
    groups = [{"params": decayed, "weight_decay": optimizer.weight_decay}]
    groups += [{"params": rest, "weight_decay": 0.0}] if rest else []
    adam = torch.optim.AdamW(groups, lr=optimizer.lr)
    for x, y in batches(torch.float32):
        net(x, y, 1 / 48)[0].backward()
        nn.utils.clip_grad_norm_(net.parameters(), optimizer.max_grad_norm)
        adam.step()
        adam.zero_grad()
    return {name: p.detach() for name, p in net.named_parameters()}


@pytest.mark.parametrize("decay", ["weights", "all"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weight_decay_matches_plain_torch_across_a_resume(process_group, tmp_path, stage, decay):
    from sdkit.distributed.zero import Zero

    optimizer = evolve(DECAY, decay=decay)
    engine = Zero(Normed(), optimizer, stage, False)
    for step, (x, y) in enumerate(batches(torch.float32)):
        if step == 2:
            engine.save(tmp_path, "two")
            engine.close()
            engine = Zero(Normed(), optimizer, stage, False)
            engine.load(tmp_path, "two", universal=False)
        engine.backward(engine.forward(x, y, 1 / 48)[0])
        engine.step(optimizer.lr)
    masters = {name: value.flatten().clone() for name, value in engine.masters()}
    engine.close()
    expected = train_decayed_with_torch(optimizer)
    assert list(masters) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(masters[name], value.flatten(), atol=2e-5, rtol=0)


def tiny_families():
    from transformers import AutoConfig

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 40,
    }
    own = {
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40},
        "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40},
        "opt": sizes | {"ffn_dim": 32, "word_embed_proj_dim": 16},
        "gemma3_text": sizes | {"head_dim": 8},
        "qwen3": sizes | {"head_dim": 8},
    }
    for name in ("llama", "qwen2", "phi", "gpt_neox", "olmo2", "mamba", *own):
        yield AutoConfig.for_model(name, **own.get(name, sizes))


@pytest.mark.parametrize("config", tiny_families(), ids=lambda config: config.model_type)
@pytest.mark.parametrize("lora", [False, True])
def test_transformers_trainer_decays_the_same_parameters(config, lora):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer

    from sdkit.distributed.zero import parameter_groups
    from sdkit.distributed.zero_shards import Root

    model = AutoModelForCausalLM.from_config(config)
    if lora:
        targets = r".*\.(q_proj|query_key_value|c_attn|in_proj)"
        fan_in = config.model_type == "gpt2"
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, fan_in_fan_out=fan_in))
    decayed_names = set(Trainer.get_decay_parameter_names(None, model))
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    decayed = {id(p) for n, p in trainable.items() if n in decayed_names}
    groups = parameter_groups(Root(model), DECAY)
    assert {id(p) for g in groups if g["weight_decay"] for p in g["params"]} == decayed
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, trainable.values()))
    assert all(group["params"] for group in groups)
    assert len(groups) == (1 if len(decayed) == len(trainable) else 2)


def test_without_selective_decay_there_is_one_group():
    from sdkit.distributed.zero import parameter_groups

    for optimizer in (OPTIMIZER, evolve(DECAY, decay="all")):
        (group,) = parameter_groups(Normed(), optimizer)
        assert len(group["params"]) == 6


RANK = """
import sys, torch
from sdkit.distributed import collectives
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
for sizes in ((2, 3), (0, 2), (2, 0), (0, 0)):
    for dtype in (torch.long, torch.float64):
        values = torch.arange(sizes[rank], dtype=dtype) + 10 * rank
        gathered, own = collectives.all_gather(values)
        joined = [*range(sizes[0]), *range(10, 10 + sizes[1])]
        assert gathered.tolist() == joined and gathered.dtype == dtype, gathered
        assert torch.equal(gathered[own], values), own
torch.distributed.destroy_process_group()
"""


def test_all_gather_concatenates_in_rank_order(tmp_path):
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)]) for rank in (0, 1)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


def test_all_gather_on_one_rank_returns_its_values(process_group):
    from sdkit.distributed import collectives as ranks

    values = torch.tensor([3.0, 1.0])
    gathered, own = ranks.all_gather(values)
    assert gathered[own].tolist() == gathered.tolist() == [3.0, 1.0]
