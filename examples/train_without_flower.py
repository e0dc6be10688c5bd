"""Train the two ends of a model on private text and export the adapter, without Flower and without a service.

    python examples/train_without_flower.py my-adapter

The trunk runs in this process. To use one that is served elsewhere, put this in the place of `LocalTrunk`; only hidden
states go there, and nothing else in this file changes:

    fl_split.TrunkConnection("trunk.example.org:9470", fl_split.Expected.from_checkpoint(base, 2, 2))
"""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

import fl_split
from fl_split import demo


def main(folder: Path) -> None:
    """Train, and write a PEFT adapter of the full model to `folder`."""
    base = demo.model_folder()  # any folder of a Hugging Face model with safetensors
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = demo.private_examples("hospital-north")
    examples = [tokenizer(f"{row['question']} {row['answer']}{tokenizer.eos_token}") for row in rows]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)

    trunk = fl_split.LocalTrunk(fl_split.load_trunk(base, 2, 2))  # all but the first two layers and the last two
    ends = fl_split.load_ends(base, 2, 2, trunk, surrogate="blocks", surrogate_layers=2)
    model = fl_split.attach(ends, fl_split.Lora(rank=8), train_bottom=True, seed=0).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=8e-3)

    loader = torch.utils.data.DataLoader(
        examples, batch_size=16, shuffle=True, collate_fn=collate, generator=torch.Generator().manual_seed(0)
    )
    for epoch in range(2):
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    fl_split.export(model, folder, base_model=str(base))
    print(f"adapter: {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
