"""Never a wrong row: whatever acts on the model, its outputs are those without the cache."""

import contextlib
import copy
import io

import pytest
import torch
import transformers as t
from architectures import ARCHITECTURES, TEXT, build
from cached import cached, run
from peft import LoraConfig, get_peft_model
from torch import nn
from training import Rows, train

from smartfrz_hf import Freezer, SmartFRZConfig, SmartFRZTrainer, find_blocks
from smartfrz_hf.activation_cache import ActivationCache, ActivationStore

pytestmark = [
    pytest.mark.usefixtures("patient"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),  # said by peft
]


def assert_as_without(model, cache, batch, **changes):
    """What the model returns now is what it returns with everything computed."""
    with torch.no_grad():
        found = model(**batch | changes).logits
        with cache.bypassed():
            expected = model(**batch | changes).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    return found


def first_block(model):
    return next(module for name, module in model.named_modules() if name.endswith("layer.0"))


# Weights


def add_in_place(weight):
    with torch.no_grad():
        weight.add_(0.1)


def add_through_data(weight):
    weight.data.add_(0.1)


def put_other_data(weight):
    weight.data = weight.data + 0.1


def swap_tensors(weight):
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() + 0.1, requires_grad=False))


CHANGES = [add_in_place, add_through_data, put_other_data, swap_tensors]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_changed_weights(change, part):
    with cached() as (model, cache, batch):
        before = assert_as_without(model, cache, batch)
        change(getattr(first_block(model).output.dense, part))
        after = assert_as_without(model, cache, batch)
        assert not torch.equal(before, after)
        hits = cache.savings.hits
        assert_as_without(model, cache, batch)
        assert cache.savings.hits > hits and cache.savings.off is None, "the new activations are kept, too"


def test_loaded_weights():
    with cached() as (model, cache, batch):
        model.load_state_dict({key: value + 0.01 for key, value in model.state_dict().items()})
        assert_as_without(model, cache, batch)


@contextlib.contextmanager
def averaged(model, change):
    """Other weights for a while, as averaged ones for an evaluation."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in list(model.parameters()):
        change(p)
    yield
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])


@pytest.mark.parametrize("change", [add_in_place, add_through_data, put_other_data])
def test_weights_exchanged_for_a_while(change):
    with cached() as (model, cache, batch):
        other = {"input_ids": batch["input_ids"].flip(1)}
        with averaged(model, change):
            assert_as_without(model, cache, batch | other)
        hits = cache.savings.hits
        assert_as_without(model, cache, batch)
        assert cache.savings.hits == hits + 4, "what was kept before is good again"


@pytest.mark.parametrize("change", CHANGES)
def test_weights_changed_after_the_first_padded_batch(change):
    """Its rows wait until the backward pass has told whether padding is read."""
    model = build("bert")
    stack = find_blocks(model)
    Freezer(stack).freeze_to(3)
    cache = ActivationCache(stack, ActivationStore(2**24), total_steps=100)
    cache.freeze_to(3)
    batch = ARCHITECTURES["bert"].batch(model)
    batch["attention_mask"][:, -3:] = 0
    model.train()
    for module in model.modules():
        module.p = 0.0 if isinstance(module, nn.Dropout) else getattr(module, "p", None)
    model(**batch).loss.backward()
    change(first_block(model).attention.self.value.bias)  # a constant added to a weight would cancel behind a norm
    cache.end_of_step(1)
    expected = None
    for bypass in (True, False):
        with cache.bypassed() if bypass else contextlib.nullcontext():
            loss = model(**batch).loss
        expected = loss if bypass else expected
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert cache.savings.off is None
    cache.close()


def test_one_element_changed_through_data_in_a_large_front():
    """Between two looks at everything, only a part of the elements of a large front is looked at."""
    with cached() as (model, cache, batch):
        cache._state._set_probes([])  # as if none of them were
        model.bert.embeddings.word_embeddings.weight.data[batch["input_ids"][0, 0]] += 1
        model.train()
        model.eval()
        model.train()
        for module in (model.dropout, *model.bert.encoder.layer[2:]):
            module.eval()
        assert_as_without(model, cache, batch)


def test_another_module_in_the_front():
    with cached() as (model, cache, batch):
        block = first_block(model)
        block.output.dense = copy.deepcopy(block.output.dense)
        add_in_place(block.output.dense.weight)
        assert_as_without(model, cache, batch)


def test_a_part_of_the_front_that_trains_is_computed():
    with cached() as (model, cache, batch):
        weight = first_block(model).output.dense.weight.requires_grad_(True)
        rows = cache.savings.rows
        model(**batch).loss.backward()
        assert weight.grad is None or weight.grad.any()  # the graph is cut by the freezer, not by the cache
        assert cache.savings.rows == rows and "trains" in cache._why_unused()


# Adapters and other settings


@pytest.fixture
def adapted():
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False, lora_dropout=0.0)
    return get_peft_model(build("llama"), config)


def test_adapters_switched_off_and_scaled(adapted):
    with cached("llama", model=adapted, rounds=0) as (model, cache, batch):
        layers = [m for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]

        def outputs():
            on = assert_as_without(model, cache, batch)
            with model.disable_adapter():
                off = assert_as_without(model, cache, batch)
            for layer in layers:
                layer.scaling["default"] *= 2
            scaled = assert_as_without(model, cache, batch)
            for layer in layers:
                layer.scaling["default"] /= 2
            return on, off, scaled

        first = outputs()
        assert all(not torch.allclose(a, b) for a, b in zip(first, first[1:], strict=False))
        hits = cache.savings.hits
        outputs()
        assert cache.savings.hits == hits + 12, "each is kept beside the others"


def test_another_adapter(adapted):
    adapted.add_adapter("other", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with cached("llama", model=adapted) as (model, cache, batch):
        before = assert_as_without(model, cache, batch)
        model.set_adapter("other")
        model.requires_grad_(False)
        assert not torch.allclose(before, assert_as_without(model, cache, batch))


def test_an_attribute_of_a_frozen_block():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.factor = nn.Linear(8, 8), 1.0

        def forward(self, hidden):
            return hidden + self.factor * self.linear(hidden)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layers = nn.Linear(8, 8), nn.ModuleList(Block() for _ in range(4))

        def forward(self, x):
            x = self.embed(x)
            for layer in self.layers:
                x = layer(x)
            return x

    model = Net()
    stack = find_blocks(model)
    Freezer(stack).freeze_to(3)
    cache = ActivationCache(stack, ActivationStore(2**20))
    cache.freeze_to(3)
    x = torch.randn(4, 8)
    with torch.no_grad():
        for factor in (1.0, 2.0, 1.0, 2.0):
            model.layers[0].factor = factor
            found = model(x)
            with cache.bypassed():
                assert torch.allclose(found, model(x))
    assert cache.savings.hits == 8
    cache.close()


def test_autocast_is_part_of_the_key():
    with cached() as (model, cache, batch):
        for dtype in (torch.bfloat16, torch.float16, None, torch.bfloat16):
            with torch.autocast("cpu", dtype, enabled=dtype is not None), torch.no_grad():
                found = model(**batch).logits
                with cache.bypassed():
                    torch.testing.assert_close(found, model(**batch).logits, rtol=0.02, atol=0.02)
        assert cache.savings.hits == 4 * 4


# Inputs


def test_perturbed_embeddings_are_not_found():
    with cached(rounds=0) as (model, cache, batch):
        embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach()
        for noise in (0.0, 0.1, 0.0):
            assert_as_without(model, cache, batch, inputs_embeds=embeds + noise)
        assert cache.savings.hits == 4


def test_inputs_that_require_a_gradient_get_one():
    """Where nothing cuts the graph, the cache does not either."""
    model = build("bert").requires_grad_(False)
    stack = find_blocks(model)
    cache = ActivationCache(stack, ActivationStore(2**20))
    cache.freeze_to(3)
    batch = ARCHITECTURES["bert"].batch(model)
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    for _ in range(3):
        model(inputs_embeds=embeds, **batch).loss.backward()
        assert embeds.grad.any()
        embeds.grad = None
    assert not cache.savings.rows
    cache.close()


# Hooks


def watch_forward(model, seen):
    first_block(model).register_forward_hook(lambda module, args, output: seen.append(output))


def watch_input(model, seen):
    model.bert.encoder.layer[1].attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))


def watch_container(model, seen):
    model.bert.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))


def replace_forward(model, seen):
    block = first_block(model)
    real = block.forward

    def forward(*args, **kwargs):
        output = real(*args, **kwargs)
        seen.append(output)
        return output

    block.forward = forward


@pytest.mark.parametrize("put", [watch_forward, watch_input, watch_container, replace_forward])
def test_hooks_see_all_rows(put):
    with cached() as (model, cache, batch):
        seen = []
        put(model, seen)
        for _ in range(3):
            assert_as_without(model, cache, batch)
        served = [s[0] if isinstance(s, tuple) else s for s in seen]
        assert len(served) == 6 and all(torch.equal(hidden, served[0]) for hidden in served)


def test_hooks_on_all_modules_see_all_rows():
    with cached() as (model, cache, batch):
        block, seen = first_block(model), []
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, args, output: seen.append(output) if module is block else None
        )
        try:
            assert_as_without(model, cache, batch)
        finally:
            hook.remove()
        assert len(seen) == 2


def test_hooks_that_change_the_front():
    with cached() as (model, cache, batch):
        hook = first_block(model).register_forward_hook(lambda module, args, output: output + 1)
        assert_as_without(model, cache, batch)
        hook.remove()
        assert_as_without(model, cache, batch)


def test_asking_for_hidden_states_runs_the_front_and_leaves_the_cache_on():
    with cached() as (model, cache, batch):
        with torch.no_grad():
            found = model(**batch, output_hidden_states=True)
            with cache.bypassed():
                expected = model(**batch, output_hidden_states=True)
        assert all(torch.equal(a, b) for a, b in zip(expected.hidden_states, found.hidden_states, strict=True))
        hits = cache.savings.hits
        assert_as_without(model, cache, batch)
        assert cache.savings.hits == hits + 4, "the hooks of Transformers are no hooks of somebody's"


# Random draws


class Noisy(nn.Module):
    """A model whose front draws random numbers in training, in one of many ways."""

    def __init__(self, how):
        super().__init__()
        self.how, self.embed = how, nn.Embedding(99, 8)
        self.layers, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.embed(input_ids)
        if self.training and self.how == "dropout":
            x = nn.functional.dropout(x, 0.1)
        if self.training and self.how == "noise":
            x = x + 0.1 * torch.randn_like(x)
        if self.training and self.how == "numpy":
            import numpy

            x = x * float(numpy.random.rand())
        if self.training and self.how == "python":
            import random

            x = x * random.random()
        for layer in self.layers:
            x = layer(x)
            if self.training and self.how == "rarely":
                x = x * (1 + (torch.rand(()) < 0.001).float())
        logits = self.head(x.mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("how", ["dropout", "noise", "numpy", "python", "rarely"])
def test_a_front_that_draws_random_numbers_is_computed(tmp_path, how):
    torch.manual_seed(0)
    trainer = run(tmp_path, True, Noisy(how), policy="static", smartfrz={"static_depth": 3}, eval_strategy="no")
    assert "random numbers" in trainer.ledger.cache.off and not trainer.ledger.cache.hits


def test_dropout_in_a_models_own_forward(tmp_path):
    sizes = TEXT | {"activation_dropout": 0.0}
    model = t.BioGptForSequenceClassification(t.BioGptConfig(**sizes, pad_token_id=1))
    trainer = run(tmp_path, True, model, policy="static", smartfrz={"static_depth": 3}, eval_strategy="no")
    assert "random numbers" in trainer.ledger.cache.off


def test_noisy_embeddings_are_computed(tmp_path):
    """NEFTune adds its noise by a hook."""
    trainer = run(tmp_path, True, policy="static", neftune_noise_alpha=5, eval_strategy="no")
    assert not trainer.ledger.cache.rows and "hook" in trainer.ledger.cache.off


# Checks in use


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_a_wrong_value_in_the_store_is_noticed(value, caplog):
    with cached(rounds=1) as (model, cache, batch):
        for row in cache.store._memory._rows.values():
            row.values.add_(value)
        with torch.no_grad():
            found = model(**batch).logits
        expected = model(**batch).logits
        assert torch.equal(found, expected) and "forward" not in model.bert.__dict__
        assert "finite" in cache.savings.off if value != 1.0 else "computing" in cache.savings.off
        assert sum("activation cache is off" in record.message for record in caplog.records) == 1


def test_a_wrong_value_is_noticed_within_a_hundred_batches(monkeypatch):
    monkeypatch.setattr("smartfrz_hf.activation_cache.checks.CHECK_TIME", 1.0)  # of so short a run, 1 % is too little
    with cached(rounds=4) as (model, cache, batch):
        for row in cache.store._memory._rows.values():
            row.values.mul_(1.01)
        for _ in range(100):
            with torch.no_grad():
                model(**batch)
        assert "computing" in cache.savings.off


def test_a_front_that_overflows_turns_it_off():
    with cached(rounds=0) as (model, cache, batch):
        first_block(model).output.dense.weight.data.fill_(float("inf"))
        with torch.no_grad():
            model(**batch)
        assert "not finite" in cache._why_unused() or "not finite" in (cache.savings.off or "")


@pytest.mark.parametrize("name", ["mpnet", "deberta-v2"])
def test_rows_that_move_on_read_the_table_in_the_stem(name):
    """With all units frozen, nothing behind the boundary reads the table of positions, but a row that moves on does."""
    model = build(name).eval()
    stack = find_blocks(model)
    freezer, cache = Freezer(stack), ActivationCache(stack, ActivationStore(2**24))
    batch = ARCHITECTURES[name].batch(model)
    for depth in (3, len(stack)):
        freezer.freeze_to(depth)
        cache.freeze_to(depth)
        for _ in range(3):
            assert assert_as_without(model, cache, batch).isfinite().all()
    assert cache.savings.off is None and cache.savings.hits == 5 * 4
    cache.close()


class Leaky(nn.Module):
    """Something behind the boundary reads what a frozen block has returned; `always`, or in training alone."""

    def __init__(self, always):
        super().__init__()
        self.always, self.embed = always, nn.Embedding(99, 8)
        self.layers, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask=None, labels=None):
        x, seen = self.embed(input_ids), []
        for layer in self.layers:
            x = layer(x)
            seen.append(x)
        logits = self.head((x + seen[0] if self.always or self.training else x).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("always", [True, False], ids=["always", "in training"])
def test_a_model_that_reads_more_of_the_front_is_refused(tmp_path, always):
    trainer = run(tmp_path, True, Leaky(always), policy="static", smartfrz={"static_depth": 3})
    assert "reads more of the front" in trainer.ledger.cache.off


@pytest.mark.parametrize("padded", [False, True])
def test_a_frozen_encoder_beside_a_decoder_that_trains_is_refused(padded):
    """Nothing asks for a gradient of what it returns, so that none can tell whether its padding is read."""
    torch.manual_seed(0)
    model, batch = pegasus()
    batch["attention_mask"][:, 5:] = 0 if padded else 1
    stack = find_blocks(model.train())
    Freezer(stack).freeze_to(5)
    cache = ActivationCache(stack, ActivationStore(2**24))
    cache.freeze_to(5)
    for _ in range(2):
        model(**batch).loss.backward()
    assert "cannot be served" in (cache.savings.off or "")


# Padding


class MeanOverAll(SmartFRZTrainer):
    """A loss outside the model that reads padded positions too, as a careless pooling does."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        hidden = model(**inputs).last_hidden_state.mean(1)
        loss = nn.functional.cross_entropy(hidden[:, :2], labels)
        return (loss, {"hidden": hidden}) if return_outputs else loss


class MeanOverTokens(SmartFRZTrainer):
    """The same with the mask."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels, mask = inputs.pop("labels"), inputs["attention_mask"][:, :, None]
        hidden = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        loss = nn.functional.cross_entropy(hidden[:, :2], labels)
        return (loss, {"hidden": hidden}) if return_outputs else loss


@pytest.mark.parametrize("depth", [3, 5], ids=["some blocks", "all blocks"])
@pytest.mark.parametrize("trainer_class", [MeanOverAll, MeanOverTokens])
def test_a_loss_outside_the_model(tmp_path, trainer_class, depth):
    class Bert(t.BertModel):
        """With a norm behind the blocks, so that something trains whatever is frozen."""

        def __init__(self, config):
            super().__init__(config, add_pooling_layer=False)
            self.norm = nn.LayerNorm(config.hidden_size)

        def forward(self, input_ids, attention_mask):
            output = super().forward(input_ids, attention_mask)
            output["last_hidden_state"] = self.norm(output["last_hidden_state"])
            return output

    runs = []
    for cache in (False, True):
        torch.manual_seed(0)
        smartfrz = SmartFRZConfig(policy="static", static_depth=depth, activation_cache=cache)
        runs.append(
            train(
                tmp_path / str(cache),
                model=Bert(t.BertConfig(**TEXT)),
                trainer_class=trainer_class,
                dataset=Rows(32),
                trainer_kwargs={"smartfrz": smartfrz, "data_collator": shortened},
                remove_unused_columns=False,
                max_steps=-1,
                num_train_epochs=4,
                logging_steps=1,
            )
        )
    off, on = ([entry["loss"] for entry in r.state.log_history if "loss" in entry] for r in runs)
    torch.testing.assert_close(torch.tensor(on), torch.tensor(off), rtol=1e-4, atol=1e-4)
    cache = runs[1].ledger.cache
    assert cache.off is None
    if trainer_class is MeanOverTokens:
        assert cache.hits > 0.9 * (cache.rows - 32)
    else:  # at the same padded length, rows are still found
        assert cache.hits > 0


def shortened(rows):
    """Dynamic padding."""
    length = max(int(row["attention_mask"].sum()) for row in rows)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return batch | {key: batch[key][:, :length] for key in ("input_ids", "attention_mask")}


def test_blocks_that_read_padding_are_kept_with_it():
    with cached(rounds=0) as (model, cache, batch):
        for layer in model.bert.encoder.layer:
            real = type(layer).forward
            layer.forward = lambda hidden, *args, layer=layer, real=real, **kwargs: real(
                layer, hidden + hidden.mean(1, keepdim=True), *args, **kwargs
            )
        cache.close()
        stack = find_blocks(model)
        again = ActivationCache(stack, ActivationStore(2**20))
        again._padding.unread = True
        again.freeze_to(3)
        for end in (5, 7, 5, 7):
            batch["attention_mask"][0, 5:] = 0
            cut = {
                "attention_mask": batch["attention_mask"][:, : end + 8],
                "input_ids": batch["input_ids"][:, : end + 8],
            }
            assert_as_without(model, again, cut)
        assert again.savings.off is None and again.savings.hits == 8
        again.close()


def test_masked_tokens_within_a_row_are_kept_with_its_padding():
    """DeBERTa computes something there that depends on the padding, too little for a trial in bfloat16 to tell."""
    with cached("deberta-v2", rounds=0) as (model, cache, batch), torch.autocast("cpu", torch.bfloat16):
        cache._padding.unread = True
        batch = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
        batch["attention_mask"][:, 1] = 0
        batch["attention_mask"][:, -4:] = 0
        for end in (None, -2, -4, None, -2, -4):
            cut = {name: value[:, :end] for name, value in batch.items()}
            with torch.no_grad():
                found = model.deberta(**cut)[0]
                with cache.bypassed():
                    expected = model.deberta(**cut)[0]
            assert torch.equal(found, expected)
        assert cache.savings.hits == 3 * len(batch["input_ids"])


def test_a_trial_between_two_passes_of_one_step():
    """It puts batch norm's running statistics back, which the first backward pass may have saved."""
    model = build("resnet").train()
    stack = find_blocks(model)
    Freezer(stack).freeze_to(2)
    cache = ActivationCache(stack, ActivationStore(2**24), total_steps=100)
    cache.freeze_to(2)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first = model(pixel_values=pixels, labels=torch.tensor([0, 1])).loss
    second = model(pixel_values=pixels[..., :16], labels=torch.tensor([0, 1])).loss
    (first + second).backward()
    assert len(cache._verdicts.known) == 2
    cache.close()


# Models


def wav2vec2(**changes):
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2}
    more = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "mask_time_prob": 0.0}
    return sizes | convolutions | more | changes


SPEECH = {
    "wav2vec2": lambda: t.Wav2Vec2ForSequenceClassification(t.Wav2Vec2Config(**wav2vec2())),
    "wav2vec2, stable": lambda: t.Wav2Vec2ForSequenceClassification(
        t.Wav2Vec2Config(**wav2vec2(do_stable_layer_norm=True, feat_extract_norm="layer"))
    ),
    "wavlm": lambda: t.WavLMForSequenceClassification(
        t.WavLMConfig(**wav2vec2(num_buckets=8, max_bucket_distance=16))
    ),
}


@pytest.mark.parametrize("name", SPEECH)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_speech_models(name, training):
    torch.manual_seed(0)
    model = SPEECH[name]().train(training)
    stack = find_blocks(model, ["*.encoder.layers.*"])
    Freezer(stack).freeze_to(2)
    cache = ActivationCache(stack, ActivationStore(2**24))
    cache.freeze_to(2)
    batch = {"input_values": torch.randn(4, 400), "labels": torch.tensor([0, 1, 0, 1])}
    for _ in range(3):
        state = torch.get_rng_state()
        found = model(**batch)
        torch.set_rng_state(state)
        with cache.bypassed():
            expected = model(**batch)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
        found.loss.backward()
    active = [p for unit in stack.units[2:] for p in unit.named_parameters().values() if p.requires_grad]
    assert active and all(p.grad is not None for p in active)
    cache.close()


def whisper():
    sizes = {"encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    lengths = {"max_source_positions": 20, "max_target_positions": 24, "num_mel_bins": 8}
    config = t.WhisperConfig(
        vocab_size=99, d_model=16, encoder_ffn_dim=20, decoder_ffn_dim=20, **sizes, **tokens, **lengths
    )
    return t.WhisperForConditionalGeneration(config), {
        "input_features": torch.randn(4, 8, 40),
        "labels": torch.randint(5, 99, (4, 6)),
    }


def pegasus():
    sizes = {"encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = t.PegasusConfig(
        vocab_size=99, d_model=16, encoder_ffn_dim=20, decoder_ffn_dim=20, max_position_embeddings=40, **sizes
    )
    ids = torch.randint(5, 99, (4, 8))
    return t.PegasusForConditionalGeneration(config), {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.randint(5, 99, (4, 6)),
    }


@pytest.mark.parametrize("make", [whisper, pegasus])
def test_encoder_blocks_named_by_hand(make):
    torch.manual_seed(0)
    model, batch = make()
    model.train()
    stack = find_blocks(model, ["model.encoder.layers.*"])
    Freezer(stack).freeze_to(3)
    cache = ActivationCache(stack, ActivationStore(2**24))
    cache.freeze_to(3)
    for _ in range(4):
        state = torch.get_rng_state()
        found = model(**batch)
        torch.set_rng_state(state)
        with cache.bypassed():
            expected = model(**batch)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
        found.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    cache.close()


# Copies


def test_copies_are_plain_models():
    with cached(depth=5) as (model, cache, batch):
        expected = assert_as_without(model, cache, batch)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies = [copy.deepcopy(model), torch.load(file, weights_only=False), copy.deepcopy(copy.deepcopy(model))]
        for parameter in first_block(model).parameters():
            parameter.data.fill_(0.5)
        rows = cache.savings.rows
        for twin in copies:
            torch.testing.assert_close(twin(**batch).logits, expected)
            twin.requires_grad_(True).train()
            twin(**batch).loss.backward()
            assert all(p.grad is not None for p in twin.parameters())
        assert cache.savings.rows == rows


def test_a_forward_pass_replaced_later_stays():
    with cached() as (model, cache, batch):
        block = first_block(model)
        replace_forward(model, seen := [])
        cache.close()
        with torch.no_grad():
            model(**batch)
        assert len(seen) == 1 and "forward" in block.__dict__


# Silence


@pytest.mark.parametrize(
    ("name", "value"), [("position_ids", torch.arange(16)[None]), ("token_type_ids", torch.tensor(0))]
)
def test_says_which_argument_has_no_rows(name, value):
    with cached(rounds=0) as (model, cache, batch), torch.no_grad(), contextlib.suppress(RuntimeError, IndexError):
        model(**batch, **{name: value})
    assert cache.savings.off.startswith(f"`{name}` does not have one entry per row of `input_ids`; give it one")


def test_says_that_it_is_not_used(tmp_path, caplog):
    model = build("bert")
    watch_forward(model, [])
    trainer = run(tmp_path, True, model, policy="static", eval_strategy="no")
    said = [record.message for record in caplog.records if "not used in a whole epoch" in record.message]
    assert len(said) == 1 and "hook on encoder.layer.0" in said[0]
    assert "hook" in trainer.ledger.cache.off
