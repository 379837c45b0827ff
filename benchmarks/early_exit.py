"""Time frames of an intermediate layer against a full pass of transformers.

w2v-BERT 2.0 at layer 17 of 24 and HuBERT-base at layer 9 of 12, full size, random weights, fp32, front end included,
on real or synthetic sound: single files of 10 s, and a batch of mixed lengths that transformers pads in full while
we encode length by length (masking lets us cut batches by length without changing units). transformers runs with SDPA
where it has it, which is its faster setting.
"""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from speechtok.benchmarks.runner import arguments, interleaved, machine, write

from speechtok.audio.compat import import_torchaudio
from speechtok.encoders.base import Encoder
from speechtok.encoders.pretrained import load_checkpoint

MIXED_SECONDS = (2.0, 3.5, 5.0, 7.5, 10.0, 14.0)


def waves(seconds: tuple[float, ...]) -> list[torch.Tensor]:
    """Speech-like noise of given lengths: speed does not depend on what is said."""
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.standard_normal(int(s * 16000)).astype(np.float32) * 0.1) for s in seconds]


def w2v_bert(layer: int) -> tuple[Encoder, Callable[[list[torch.Tensor]], Any]]:
    """Our encoder, and a full pass of transformers with the same weights."""
    from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertConfig, Wav2Vec2BertModel

    from speechtok.encoders.w2v_bert import W2vBertEncoder
    from speechtok.encoders.w2v_bert_config import W2vBertConfig

    config = Wav2Vec2BertConfig()
    model = Wav2Vec2BertModel(config).eval()
    ours = load_checkpoint(W2vBertEncoder, W2vBertConfig.from_hf(config.to_dict(), None), layer, model.state_dict())
    extractor = SeamlessM4TFeatureExtractor(padding_value=1)

    def theirs(batch: list[torch.Tensor]) -> Any:
        inputs = extractor([w.numpy() for w in batch], sampling_rate=16000, return_tensors="pt", padding=True)
        return model(**inputs, output_hidden_states=True).hidden_states[layer]

    return ours, theirs


def hubert(layer: int) -> tuple[Encoder, Callable[[list[torch.Tensor]], Any]]:
    """As `w2v_bert`. Padded batches of HuBERT-base are wrong in transformers (group norm); only speed counts here."""
    from transformers import HubertConfig, HubertModel

    from speechtok.encoders.hubert import HubertConfig as OurConfig
    from speechtok.encoders.hubert import HubertEncoder

    config = HubertConfig()
    model = HubertModel(config).eval()
    ours = load_checkpoint(HubertEncoder, OurConfig.from_hf(config.to_dict(), None), layer, model.state_dict())

    def theirs(batch: list[torch.Tensor]) -> Any:
        padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor([len(w) for w in batch])[:, None]
        return model(padded, attention_mask=mask.long(), output_hidden_states=True).hidden_states[layer]

    return ours, theirs


def one_by_one(encoder: Encoder, batch: list[torch.Tensor]) -> None:
    for wave in batch:
        encoder(wave[None])


def padded(encoder: Encoder, batch: list[torch.Tensor]) -> None:
    encoder(torch.nn.utils.rnn.pad_sequence(batch, batch_first=True), torch.tensor([len(w) for w in batch]))


def main() -> None:
    """Run and report."""
    options = arguments(__doc__)
    import_torchaudio()
    torch.manual_seed(0)
    models = {"w2v-bert-2.0": (w2v_bert, 17, 24), "hubert-base": (hubert, 9, 12)}
    result: dict[str, Any] = {"machine": machine(), "precision": "float32", "models": {}}
    for name, (build, layer, layers) in models.items():
        with torch.inference_mode():
            ours, theirs = build(layer)
            row: dict[str, Any] = {"layer": layer, "layers": layers}
            for case, batch in (("single 10 s", waves((10.0,))), ("mixed lengths", waves(MIXED_SECONDS))):
                runs = {"transformers": partial(theirs, batch), "speechtok": partial(one_by_one, ours, batch)}
                if len(batch) > 1:
                    runs["speechtok padded"] = partial(padded, ours, batch)
                times = interleaved(runs, options.repeats)
                audio = sum(len(w) for w in batch) / 16000
                row[case] = {
                    "audio_seconds": audio,
                    "seconds": times,
                    "times_real_time": {run: audio / value["median"] for run, value in times.items()},
                    "speedup": {run: times["transformers"]["median"] / value["median"] for run, value in times.items()},
                }
        result["models"][name] = row
        del ours, theirs
        gc.collect()
    write(options.json, result)


if __name__ == "__main__":
    main()
