"""`python -m spot_kernels`: whether the native library is there, or what runs instead; which instructions it uses."""

from spot_kernels import native

print(native.describe())
if levels := native.slot_attention_levels():
    print(f"slot attention with {levels[0]} instructions (here too: {', '.join(levels[1:]) or 'none'})")
