"""A bundle: one exported model on disk, described by its manifest.json.

tiny-emoji/
    manifest.json               everything below, as `Manifest`
    text_encoder/model.onnx     one folder a component
    unet/model.onnx
    vae_decoder/model.onnx
    vae_encoder/model.onnx
    safety_checker/model.onnx   where the checkpoint has one
    reference.png               what diffusers itself draws, to compare with
    tokenizer/tokenizer.json
    scheduler/scheduler_config.json
"""
