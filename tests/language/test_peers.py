"""`sdkit import`: configurations of TRL, verl and the SDPO repository become run files; what has no equivalent is listed."""

import json
from typing import get_origin

import pytest

from sdkit.language.errors import InvalidSpec, UnreadableInput
from sdkit.language.introspection import keys_of, options_of
from sdkit.language.load import load_spec
from sdkit.language.peer_formulas import FORMULAS
from sdkit.language.peers import keys_read_by, peers, read_table, translate
from sdkit.language.specs import ExperimentSpec, Table
from sdkit.language.suggestions import advice, all_keys

TRL = {"model_name_or_path": "org/model", "dataset_name": "org/data", "report_to": "wandb"}


@pytest.fixture
def imported(tmp_path):
    """Translates a configuration; returns the checked spec and the report."""

    def run(config, *overrides, **options):
        path = tmp_path / "config.yaml"
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        _, translation = translate(path, overrides, **options)
        target = tmp_path / "run.yaml"
        target.write_text(translation.text)
        checked = load_spec(target)
        assert [p.message for p in checked.problems if p.severity == "error"] == []
        return checked.spec, translation.report()

    return run


@pytest.mark.parametrize("name", peers())
def test_tables_name_keys_of_the_language_and_known_formulas(name):
    keys = [(at.path, options_of(at.key.type)) for at in all_keys()]
    known = [path for path, _ in keys]
    known += [(*path, "NAME") for path, options in keys if any(get_origin(o) is Table for o in options)]
    known += [(*path, "kind") for path, options in keys if any(hasattr(o, "kind") for o in options)]
    known.append(("losses", "NAME", "kind"))

    def is_key(path):
        return any(len(k) == len(path) and all(a in ("NAME", b) for a, b in zip(k, path, strict=True)) for k in known)

    table = read_table(name)
    for rule in table.rules:
        assert rule.get("formula", "wrap") in FORMULAS
        assert {"key", "value"} & rule.keys()
        path = tuple(rule["to"].split(".")) if "to" in rule else ("model",)
        assert is_key(path), path
    assert {key for key in table.defaults if not table.knows(key)} == set()
    rule_keys = {key for rule in table.rules for key in keys_read_by(rule)}
    assert not rule_keys & {*table.ignored, *table.unsupported}


def test_self_distillation_from_demonstrations(imported):
    config = TRL | {
        "learning_rate": 2e-5,
        "num_generations": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16,
        "teacher_model_kind": "ema",
        "teacher_update_rate": 0.01,
        "distillation_alpha": 0.0,
        "distillation_mode": "full_logits",
        "num_loss_tokens_to_skip": 3,
        "max_steps": 40,
        "warmup_ratio": 0.1,
        "unheard_of": 7,
        "min_p": None,
    }
    spec, report = imported(config, processes=4)
    assert (spec.model.path, spec.data.source.path) == ("org/model", "org/data")
    assert (spec.training.prompts_per_step, spec.training.updates_per_rollout, spec.training.steps) == (32, 1, 40)
    assert spec.training.epochs is None
    assert (spec.teacher.weights.kind, spec.teacher.weights.update_rate) == ("ema", 0.01)
    assert spec.teacher.sees.template == "{prompt}\n\n{privileged_context}"
    term = spec.losses["distil"]
    assert (term.divergence.kind, term.support.kind, term.mask.skip_first) == ("forward_kl", "vocabulary", 3)
    assert "warmup_ratio: 0.1 – count the steps and give optimizer.warmup_steps" in report
    assert "unheard_of: 7 – not known" in report
    assert "min_p" not in report
    assert "report_to" not in report


def test_defaults_are_the_peers_own(imported):
    spec, _ = imported({"num_loss_tokens_to_skip": 0})
    assert (spec.rollout.completions_per_prompt, spec.rollout.max_new_tokens) == (8, 256)
    assert (spec.optimizer.lr, spec.optimizer.lr_scheduler_type, spec.training.epochs) == (5e-5, "linear", 3.0)
    term = spec.losses["distil"]
    assert (term.divergence.teacher_share, term.support.k, term.support.remainder) == (0.5, 100, "renormalize")
    assert spec.teacher.weights.kind == "frozen"
    assert spec.training.prompts_per_step == 1  # 8 rows are one group of 8


def test_self_distillation_from_siblings(imported):
    config = TRL | {
        "success_reward_threshold": 0.5,
        "include_environment_feedback": True,
        "distillation_weight": 0.5,
        "distillation_alpha": 0.5,
        "distillation_mode": "topk_logits",
        "distillation_topk": 20,
        "distillation_add_tail": True,
    }
    spec, report = imported(config)
    solution, feedback = spec.slots["solution"], spec.slots["feedback"]
    assert (solution.threshold, solution.exclude_self, solution.strip_thinking) == (0.5, True, False)
    assert solution.wrap == "\nCorrect solution:\n\n{value}\n\n"
    assert (feedback.kind, feedback.name) == ("column", "privileged_context")
    assert spec.losses["distil"].support.remainder == "tail_bucket"
    assert "distillation_weight: 0.5 – " in report
    assert "rewards.correct: TRL takes its rewards as Python functions" in report
    spec, _ = imported({"success_reward_threshold": 1.0})
    assert "{feedback}" not in spec.teacher.sees.template
    assert list(spec.slots) == ["solution"]


def test_distillation_from_a_model(imported):
    spec, _ = imported(TRL | {"lmbda": 1.0, "beta": 0.1, "teacher_model_name_or_path": "org/teacher"})
    assert spec.rollout.sampled_by.kind == "student"
    assert (spec.rollout.temperature, spec.losses["distil"].temperature) == (0.9, 1.0)
    assert spec.losses["distil"].divergence.teacher_share == 0.1
    assert spec.teacher.weights.path == "org/teacher"
    assert spec.data.columns["demonstration"].last_turn == "messages"


def test_group_relative_rewards(imported):
    config = TRL | {
        "epsilon": 0.1,
        "epsilon_high": 0.3,
        "loss_type": "grpo",
        "beta": 0.04,
        "scale_rewards": False,
        "use_peft": True,
        "lora_r": 32,
        "use_vllm": True,
        "per_device_train_batch_size": 16,
        "steps_per_generation": 4,
    }
    spec, report = imported(config)
    term, reference = spec.losses["policy"], spec.losses["reference"]
    assert (term.clip.low, term.clip.high, term.advantage.scale) == (0.1, 0.3, "none")
    assert (term.average.kind, reference.coefficient) == ("per_sequence", 0.04)
    assert (spec.model.lora.r, spec.model.lora.lora_alpha) == (32, 32)
    assert (spec.training.prompts_per_step, spec.training.updates_per_rollout) == (8, 4)
    assert (spec.rollout.backend.kind, spec.rollout.backend.gpu_memory_utilization) == ("vllm", 0.3)
    assert "losses.reference (beta): TRL differentiates the k3 estimate" in report
    spec, _ = imported({"epsilon": 0.2, "beta": 0})
    assert (list(spec.losses), spec.losses["policy"].clip.high) == (["policy"], 0.2)


VERL = """
defaults: [ppo_trainer, _self_]
length: 2048
data: {train_files: ["${oc.env:ROOT}/train.parquet"], train_batch_size: 32, max_response_length: "${length}"}
actor_rollout_ref:
  model: {path: org/model}
  actor: {ppo_mini_batch_size: 8, optim: {lr: 1e-5}, policy_loss: {loss_mode: LOSS}, entropy_coeff: 0.01}
  rollout: {n: 8, top_k: -1}
algorithm: {adv_estimator: grpo, norm_adv_by_std_in_grpo: false, rollout_correction: {rollout_is: token}}
trainer: {total_epochs: 3, nnodes: 2}
"""


def test_verl(imported):
    spec, report = imported(VERL.replace("LOSS", "vanilla"), "+actor_rollout_ref.actor.clip_ratio_high=0.28")
    term = spec.losses["policy"]
    assert (term.clip.low, term.clip.high, term.clip.dual, term.importance.sampler.cap) == (0.2, 0.28, 3.0, 2.0)
    assert (spec.training.prompts_per_step, spec.training.updates_per_rollout, spec.training.epochs) == (32, 4, 3)
    assert (spec.rollout.max_new_tokens, spec.rollout.top_k) == (2048, 0)
    assert "actor_rollout_ref.actor.entropy_coeff: 0.01 – there is no entropy bonus" in report
    assert "data.train_files" in report
    assert "length: 2048" not in report


def test_the_repository_of_the_paper(imported):
    self = "actor_rollout_ref.actor.self_distillation"
    spec, _ = imported(VERL.replace("LOSS", "sdpo"), "data.train_files=[train.parquet, more.parquet]")
    assert spec.data.source.path == "train.parquet"
    assert (spec.teacher.weights.update_rate, spec.teacher.weights.every) == (0.05, "rollout_batch")
    assert (spec.slots["feedback"].kind, spec.slots["feedback"].when) == ("feedback", "no_solution")
    term = spec.losses["distil"]
    assert (term.divergence.teacher_share, term.support.k, term.importance.old_policy.cap) == (0.5, 100, 2.0)
    assert (term.importance.sampler.cap, term.average.empty_rows) == (2.0, "count")
    assert list(spec.losses) == ["distil"]
    options = (f"{self}.teacher_regularization=trust-region", f"{self}.alpha=1.0", f"{self}.distillation_topk=null")
    spec, report = imported(VERL.replace("LOSS", "sdpo"), *options, f"{self}.invented=1")
    assert (spec.teacher.weights.kind, spec.blend.student_share) == ("frozen", 0.05)
    assert (spec.losses["distil"].divergence.kind, spec.losses["distil"].support.kind) == ("reverse_kl", "vocabulary")
    assert f"{self}.invented: 1 – not known" in report


def test_a_value_without_equivalent_is_listed_with_what_there_is(imported):
    _, report = imported(TRL | {"epsilon": 0.2, "loss_type": "sapo", "num_iterations": 2})
    assert "loss_type: 'sapo' – sdkit has 'dapo', 'bnpo', 'grpo', 'dr_grpo'" in report
    assert "num_iterations: 2 – " in report


def test_nested_settings_are_read_as_one(imported):
    spec, _ = imported(TRL | {"epsilon": 0.2, "chat_template_kwargs": {"enable_thinking": False}})
    assert dict(spec.model.chat_template_kwargs) == {"enable_thinking": False}


def test_a_setting_of_another_backend_is_left_out(imported):
    options = ("actor_rollout_ref.rollout.name=hf", "actor_rollout_ref.rollout.max_num_seqs=8")
    spec, _ = imported(VERL.replace("LOSS", "vanilla"), *options)
    assert spec.rollout.backend.kind == "transformers"


@pytest.mark.parametrize("wrong", ["many", 0, [], None])
def test_wrong_values_end_in_no_traceback(tmp_path, wrong):
    names = [
        "per_device_train_batch_size",
        "num_generations",
        "max_completion_length",
        "max_steps",
        "epsilon",
        "temperature",
    ]
    for name in names:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(TRL | {"epsilon": 0.1, name: wrong}))
        assert translate(path, peer="trl_grpo")[1].text


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"learning_rate": 1e-5}, {}, "does not show"),
        ({"learning_rate": 1e-5}, {"peer": "axolotl"}, "'axolotl' is not one of 'trl_gkd'"),
        ([1], {}, "is not a map of settings"),
    ],
)
def test_what_cannot_be_recognised_is_refused(tmp_path, config, options, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UnreadableInput, match=message):
        translate(path, **options)


def test_yaml_problems_are_shown(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("a: !!python/object:os.system x\n")
    with pytest.raises(InvalidSpec, match="tags are not supported"):
        translate(path)


@pytest.mark.parametrize("name", ["trl_sdft", "trl_sdpo", "trl_gkd", "trl_grpo", "verl"])
def test_no_key_of_a_peer_is_unknown_without_a_word(name):
    """Copied into a run file, each is answered by sdkit's key, by where that belongs, or by the reason why there is none."""
    table = read_table(name)
    keys = {rule["key"] for rule in table.rules if "key" in rule} | table.unsupported.keys()
    names = {part for key in keys for part in (key.partition(".")[0], key.rpartition(".")[2])}
    sections = {"actor", "rollout", "model", "data", "optim", "teacher"}
    assert [
        key for key in names - keys_of(ExperimentSpec).keys() - sections if not advice(key, ExperimentSpec, ())
    ] == []
