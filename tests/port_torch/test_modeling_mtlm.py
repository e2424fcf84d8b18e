"""The code of exported folders as transformers and its tools use it; test_transformers4.py has it on 4.57."""

import dataclasses
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from core.config import ModelConfig
from port_torch.hf.configuration_mtlm import MtlmConfig
from port_torch.hf.modeling_mtlm import MtlmForCausalLM, eager_attention_forward
from port_torch.hf_config import hf_config
from tests.models import random_params
from tests.port_torch.folders import SMALL, tensors_of
from tests.port_torch.test_model import flax_logits

LEARNED = SMALL["gpt"]
ROTARY = dataclasses.replace(LEARNED, positions="rope")
GROUPED = dataclasses.replace(
    ROTARY, n_kv_heads=2, head_dim=16, qk_norm=True, biases=False, qkv_biases=True,
    rope_scaling="yarn,factor=4,original_context=16",
)  # fmt: skip
KINDS = {"learned": LEARNED, "rope": ROTARY, "grouped": GROUPED}


def build(config: ModelConfig, attn_implementation: str = "sdpa") -> MtlmForCausalLM:
    """The class of the exported folder with weights in which every leaf matters."""
    content = MtlmConfig(**hf_config(config, 256, 257, "float32"), attn_implementation=attn_implementation)
    model = MtlmForCausalLM(content)
    model.load_state_dict(tensors_of(config, random_params(config)))
    return model.eval()


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, LEARNED.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Float32 sums in another order: as in test_model.py, parts in 1e5 of the largest value."""
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


# --- training ---


@pytest.mark.parametrize("accumulated", [1, 8])
def test_trainer_divides_by_the_labels_of_all_accumulated_batches(tmp_path, accumulated: int):
    """Loss and gradient norm that it logs are those of the mean over every label, whatever the batch."""
    rows = []
    for i, ids in enumerate(random_ids(8, 12)):
        hidden = [-100] * (i + 1)  # each row another number of labels, so no mean of means is the mean
        rows.append({"input_ids": ids, "labels": torch.tensor(hidden + ids[i + 1 :].tolist())})
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=8 // accumulated,
        gradient_accumulation_steps=accumulated, max_grad_norm=1e9, logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(build(LEARNED), arguments, train_dataset=rows)
    trainer.train()
    logged = trainer.state.log_history[0]

    model = build(LEARNED).double()
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    loss = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    # The log is rounded to 1e-4 in some releases; a wrong divisor is off by up to a factor of 8.
    assert logged["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_gradient_checkpointing_changes_no_gradient():
    plain, checkpointed = build(LEARNED).train(), build(LEARNED).train()
    checkpointed.gradient_checkpointing_enable()
    ids = random_ids(2, 12)
    for model in (plain, checkpointed):
        model(ids, labels=ids).loss.backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


# --- attention ---


@pytest.mark.parametrize("kind", KINDS)
def test_eager_and_sdpa_agree(kind: str):
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    a, b = build(KINDS[kind]), build(KINDS[kind], "eager")
    with torch.inference_mode():
        assert_close(a(ids).logits, b(ids).logits)
        shown = mask.bool()
        assert_close(a(ids, attention_mask=mask).logits[shown], b(ids, attention_mask=mask).logits[shown])
        a.set_attn_implementation("eager")
        assert torch.equal(a(ids).logits, b(ids).logits)


def test_every_attention_function_of_transformers_may_be_named():
    """Flash, flex and vLLM's are functions registered there, called with keyword arguments of their own."""
    model, ids, seen = build(LEARNED), random_ids(2, 12), []
    assert model._supports_flash_attn and model._supports_flex_attn and model.is_backend_compatible()

    def attend(module: Any, *tensors: Any, **given: Any) -> Any:
        seen.append((module.layer_idx, module.is_causal, given.pop("instances"), given["scaling"]))
        query, key, value, mask = tensors
        assert mask is None  # transformers makes none for a function that it knows no mask of
        causal = torch.full((12, 12), -torch.inf).triu(1)
        return eager_attention_forward(module, query, key, value, causal, given["scaling"])

    ALL_ATTENTION_FUNCTIONS.register("of another project", attend)
    try:
        with torch.inference_mode():
            expected = model(ids).logits
            model.set_attn_implementation("of another project")
            assert_close(model(ids, instances="its own").logits, expected)
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["of another project"]
    assert seen == [(i, True, "its own", 12**-0.5) for i in range(LEARNED.n_layers)]


def test_hidden_states_and_attention_weights_are_given():
    model, ids = build(LEARNED, "eager"), random_ids(2, 12)
    with torch.inference_mode():
        out = model(ids, output_hidden_states=True, output_attentions=True)
        assert len(out.hidden_states) == LEARNED.n_layers + 1  # the embeddings, and after each layer
        embedded = model.model.embed_tokens(ids) + model.model.embed_positions(torch.arange(12))
        assert torch.equal(out.hidden_states[0], embedded)
        assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
        assert len(out.attentions) == LEARNED.n_layers
        weights = torch.stack(out.attentions)
        assert weights.shape == (LEARNED.n_layers, 2, LEARNED.n_heads, 12, 12)
        assert_close(weights.sum(-1), torch.ones(()))
        assert not weights.triu(1).any()
        out = model(ids)
        assert out.hidden_states is None and out.attentions is None
        model.config.output_hidden_states = True
        assert len(model(ids).hidden_states) == LEARNED.n_layers + 1
        with pytest.raises(ValueError, match="'sdpa' gives no attention weights"):
            build(LEARNED)(ids, output_attentions=True)


# --- positions ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_padded_batch_computes_what_each_row_does_alone(kind: str, implementation: str):
    """Without `position_ids`: they come from the mask, with a cache and on either side of the padding."""
    model, ids = build(KINDS[kind], implementation), random_ids(3, 12)
    with torch.inference_mode():
        for side, padding in (("left", (0, 5, 3)), ("right", (0, 4, 7))):
            shown = [slice(n, None) if side == "left" else slice(0, 12 - n) for n in padding]
            mask = torch.zeros(3, 12, dtype=torch.long)
            for row, part in enumerate(shown):
                mask[row, part] = 1
            whole = model(ids, attention_mask=mask).logits
            for row, part in enumerate(shown):
                assert_close(whole[row, part], model(ids[row : row + 1, part]).logits[0])
            if side == "left":
                first = model(ids[:, :9], attention_mask=mask[:, :9])
                last = model(ids[:, 9:], attention_mask=mask, past_key_values=first.past_key_values)
                assert_close(last.logits, whole[:, 9:])


def test_beyond_the_context_is_a_clear_error():
    model, n = build(LEARNED), LEARNED.context
    ids = random_ids(1, n + 1)
    with torch.inference_mode(), pytest.raises(ValueError, match=f"position {n} is beyond .* context of {n}"):
        model(ids)
    with torch.inference_mode():
        model(ids[:, :n])
        # Padding takes no position.
        mask = torch.ones(1, n + 1, dtype=torch.long)
        mask[0, 0] = 0
        assert_close(model(ids, attention_mask=mask).logits[:, 1:], model(ids[:, 1:]).logits)
        with pytest.raises(ValueError, match="is beyond this model's context"):
            model(ids[:, :2], position_ids=torch.tensor([[0, n]]))
        with pytest.raises(ValueError, match="is beyond this model's context"):
            model.generate(ids[:, :n], max_new_tokens=2, do_sample=False, pad_token_id=257)
        build(ROTARY)(ids)  # rotary positions have no end


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_flax_computes(kind: str):
    config, ids = KINDS[kind], random_ids(2, 40)
    expected = torch.from_numpy(flax_logits(config, random_params(config), ids.numpy()).copy())
    with torch.inference_mode():
        assert_close(build(config)(ids).logits, expected)
