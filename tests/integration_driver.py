"""Trains one tiny Llama with a trainer of other people; run by tests/test_integrations.py, alone or under torchrun.

python tests/integration_driver.py TRAINER OUT.json FOLDER     the losses of the whole run, and of one that was resumed
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM

from aurora import Aurora, param_groups

STEPS, SAVED_AT, BATCH = 8, 4, 8


class Rows(Dataset):
    def __len__(self):
        return STEPS * BATCH

    def __getitem__(self, index):
        tokens = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def new_model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=1, max_position_embeddings=32, **sizes))


def new_optimizer(model):
    groups = param_groups(model, adamw_lr=1e-3)
    optimizer = Aurora(groups, lr=0.02, weight_decay=0.01, polar_dtype="float32")
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (2 * STEPS))


def plain(folder, resume):
    model = new_model()
    optimizer, scheduler = new_optimizer(model)
    losses = []
    for batch in DataLoader(Rows(), BATCH):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), scheduler.step(), optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def transformers(folder, resume):
    from transformers import Trainer, TrainingArguments

    class Ordered(Trainer):
        def _get_train_sampler(self, *args):
            return SequentialSampler(Rows())

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    options = dict(max_steps=STEPS, save_steps=SAVED_AT, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True)
    options |= dict(per_device_train_batch_size=BATCH // world_size, max_grad_norm=1.0, save_only_model=False)
    model = new_model()
    trainer = Ordered(
        model, TrainingArguments(folder, **options), train_dataset=Rows(), optimizers=new_optimizer(model)
    )
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{SAVED_AT}" if resume else None)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def accelerate(folder, resume):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = new_model()
    optimizer, scheduler = new_optimizer(model)
    loader = DataLoader(Rows(), BATCH // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = [None] * SAVED_AT if resume else []
    if resume:
        accelerator.load_state(folder)
        scheduler.load_state_dict(torch.load(f"{folder}/scheduler.pt"))
        loader = accelerator.skip_first_batches(loader, SAVED_AT)
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), scheduler.step(), optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        if len(losses) == SAVED_AT and not resume:
            accelerator.save_state(folder)
            torch.save(scheduler.state_dict(), f"{folder}/scheduler.pt")
    return losses


def lightning(folder, resume):
    import lightning

    losses = [None] * SAVED_AT if resume else []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = new_model()

        def training_step(self, batch, index):
            loss = self.model(**batch).loss
            mean = loss.detach().clone()
            if dist.is_initialized():
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
            losses.append(mean.item())
            return loss

        def configure_optimizers(self):
            optimizer, scheduler = new_optimizer(self.model)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    saving = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVED_AT, save_top_k=-1)
    options = dict(accelerator="cpu", devices=world_size, strategy="ddp" if world_size > 1 else "auto")
    options |= dict(
        max_steps=STEPS, logger=False, gradient_clip_val=1.0, callbacks=[saving], use_distributed_sampler=False
    )
    trainer = lightning.Trainer(**options, enable_progress_bar=False)
    rank = int(os.environ.get("RANK", 0))
    own = [index for index in range(len(Rows())) if index // (BATCH // world_size) % world_size == rank]
    done = SAVED_AT * BATCH // world_size if resume else 0  # lightning begins a plain loader anew
    loader = DataLoader(torch.utils.data.Subset(Rows(), own[done:] + own[:done]), BATCH // world_size)
    trainer.fit(Module(), loader, ckpt_path=f"{folder}/step={SAVED_AT}.ckpt" if resume else None)
    return losses


if __name__ == "__main__":
    name, out, folder = sys.argv[1:]
    torch.set_num_threads(1)
    train = {"plain": plain, "transformers": transformers, "accelerate": accelerate, "lightning": lightning}[name]
    found = {"whole": train(folder, resume=False), "resumed": train(folder, resume=True)}
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(found))
