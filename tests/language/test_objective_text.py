"""The text of `sdkit plan` for masks, weights, denominators, routes and blends."""

from sdkit.language.specs import (
    CrossEntropy,
    DataSpec,
    Distillation,
    DriftWeight,
    ExperimentSpec,
    ExternalWeights,
    ExtrapolateBlend,
    FileWeight,
    ForwardKl,
    FrozenWeights,
    GeometricBlend,
    GroupRelative,
    InlineSource,
    LogRatio,
    LoraSpec,
    MaskSpec,
    MethodSpec,
    ModelSpec,
    OptimizerSpec,
    OverlongPenalty,
    PassRateWeight,
    PerplexityWeight,
    PerToken,
    PolicyGradient,
    PositionWeight,
    ProductBlend,
    ReverseKl,
    RouteSpec,
    Schedule,
    ShapeSpec,
    Table,
    TeacherEntropyWeight,
    TeacherSpec,
    TopKSupport,
    TrainingSpec,
    TrustRegionBlend,
    VocabularySupport,
)
from sdkit.plan.accelerators import Machine
from sdkit.plan.plan import make_plan, plan_method

WEIGHTS = {
    "rising from 0.25 to 1 around 0.3 of the completion (width 0.1)": PositionWeight(
        smallest=0.25, middle=0.3, width=0.1
    ),
    "exp(−1.5 × teacher's entropy) / its mean": TeacherEntropyWeight(rate=1.5),
    "1 + 0.5 × (1 − share of |log teacher − log student| before the token)": DriftWeight(strength=0.5),
    "(p (1 − p))^0.5, p the group's share of rewards of at least 1": PassRateWeight(),
    "the teacher's perplexity^-1 / its mean in the group": PerplexityWeight(of="teacher", power=-1),
    "bold in mine.py": FileWeight(file="mine.py", function="bold"),
}


def objective_line(term):
    (line,) = plan_method(MethodSpec(losses=Table({"term": term}))).objective
    return line


def test_every_weight_is_described():
    for text, weight in WEIGHTS.items():
        assert objective_line(CrossEntropy(weight=weight)).endswith(f", mean over tokens, weighted by {text}")


def test_every_mask_is_described():
    mask = MaskSpec(
        skip_first=3, prefix=100, special_tokens="leave_out", teacher_entropy_above=0.8, student_entropy_top=0.2
    )
    assert objective_line(CrossEntropy(mask=mask)) == (
        "term: cross entropy of the completion's tokens, first 3 tokens left out, only the first 100 tokens, "
        "special tokens left out, only where the teacher's entropy exceeds 0.8, "
        "only the 20 % of tokens with the student's largest entropies, mean over tokens"
    )


def test_joint_denominator_and_floor_are_described():
    term = PolicyGradient(
        advantage=LogRatio(floor=-2.5, below_floor="leave_out"), average=PerToken(denominator="joint")
    )
    line = objective_line(term)
    assert "advantage log teacher − log student (where it is at least -2.5)" in line
    assert line.endswith("sum over tokens / tokens of all terms that say joint")


def test_denominator_of_all_completions_is_described():
    term = CrossEntropy(average=PerToken(denominator="completions"))
    assert objective_line(term).endswith("tokens, sum over tokens / tokens of all completions")


def test_overlong_penalty_is_described():
    penalty = OverlongPenalty(stretch=4096, amount=0.5)
    line = objective_line(PolicyGradient(advantage=GroupRelative(scale="group_std", overlong=penalty)))
    reward = "reward (0.5 off a full-length completion, less over its last 4096 tokens)"
    assert f"advantage ({reward} − group mean) / (group std + 0.0001)," in line


def test_scheduled_coefficient_is_shown_in_parentheses():
    line = objective_line(CrossEntropy(coefficient=Schedule(start=1, to=0, steps=5)))
    assert line.startswith("term: (1 → 0 over 5 steps) × cross entropy")


def test_detached_weights_are_described_after_the_support():
    term = Distillation(
        divergence=ReverseKl(detach_weights=True), support=TopKSupport(k=5, chosen_by="student", remainder="drop")
    )
    text = "reverse KL(student‖teacher) over the student's top 5 tokens (drop), weights detached,"
    assert text in objective_line(term)


def test_route_is_described():
    losses = Table({"distil": CrossEntropy(), "policy": CrossEntropy()})
    routes = {
        RouteSpec(when="failed", then=("distil",)): (
            "route: rollouts with a reward below 1 go to distil, others to no term"
        ),
        RouteSpec(when="failed_with_context", threshold=0.5, then=("distil",), otherwise=("policy",)): (
            "route: rollouts with a reward below 0.5 and a teacher prompt go to distil, others to policy"
        ),
    }
    for route, text in routes.items():
        assert plan_method(MethodSpec(losses=losses, route=route)).objective[2:] == (text,)
    assert len(plan_method(MethodSpec(losses=losses)).objective) == 2


BASE = ExternalWeights(path="org/base")
BLENDS = {
    "T^(1 − c) × S^c, S the live student under the teacher's prompt, c = 0.01": TrustRegionBlend(student_share=0.01),
    "T × S^b, S the live student under the student's prompt, b = 0.8 → 0 over 9 steps": ProductBlend(
        student_power=Schedule(start=0.8, to=0, steps=9)
    ),
    "B^(1 − w) × T^w, B the frozen start model under the student's prompt, w = 0.5": GeometricBlend(teacher_share=0.5),
    "T^f × B^(1 − f), B the frozen start model under the student's prompt, f = 1.25": (ExtrapolateBlend(factor=1.25)),
    "T^f × B^(1 − f), B the model org/base under the student's prompt, f = 1.25": ExtrapolateBlend(
        factor=1.25, base=BASE
    ),
}


def plan_with_blend(blend, weights=None, lora=None):
    distil = Distillation(divergence=ForwardKl(), support=VocabularySupport())
    shape = ShapeSpec(parameters=2**30, hidden_size=8, num_hidden_layers=1, vocab_size=16, max_position_embeddings=64)
    spec = ExperimentSpec(
        teacher=TeacherSpec(weights=weights or ExternalWeights(path="org/teacher"), blend=blend),
        losses=Table({"distil": distil}),
        model=ModelSpec(path="org/name", lora=lora),
        data=DataSpec(source=InlineSource(rows=(Table({"prompt": "one"}),))),
        optimizer=OptimizerSpec(lr=1),
        training=TrainingSpec(steps=1, prompts_per_step=1),
    )
    return make_plan(spec, Machine(), shape, other_shapes={"org/base": shape})


def test_every_blend_is_described():
    for text, blend in BLENDS.items():
        plan = plan_with_blend(blend)
        assert plan.objective[1:] == (f"blend: teacher Q ∝ {text}",)
    assert len(plan_with_blend(None).objective) == 1


def test_blend_adds_roles_and_memory():
    def roles_and_memory(blend, **changes):
        plan = plan_with_blend(blend, **changes)
        roles = [role for role in plan.roles if role.startswith(("reference", "base"))]
        shares = [share.label for share in plan.memory.shares if share.label.startswith(("ref", "model"))]
        return roles, shares

    start = "reference: the frozen start model"
    lora = LoraSpec(r=4, lora_alpha=8.0)
    assert roles_and_memory(TrustRegionBlend(student_share=0.1)) == ([], [])
    assert roles_and_memory(ProductBlend(student_power=0.1)) == ([], [])
    for blend in (GeometricBlend(teacher_share=0.5), ExtrapolateBlend(factor=1.25)):
        assert roles_and_memory(blend) == ([f"{start} (a copy of the model)"], ["reference weights"])
        assert roles_and_memory(blend, lora=lora) == ([f"{start} (the student with its adapter off)"], [])
        assert roles_and_memory(blend, weights=FrozenWeights()) == ([f"{start} (the teacher)"], [])
    assert roles_and_memory(ExtrapolateBlend(factor=1.25, base=BASE)) == (
        ["base of the blend: the model org/base (a second model, bfloat16)"],
        ["model org/base"],
    )
