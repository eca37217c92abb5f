"A job in the background may be started with Ctrl-C ignored, and its children inherit that; the tests of interrupts need it to work."
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)


def small_model(folder, **settings):
    "Put a tiny world, a tokenizer of 400 and a pretrained model of one layer into a base folder; the folder."
    import torch
    from nanochat_nb import pretrain
    from nanochat_nb.data import DataSettings, prepare
    from nanochat_nb.tokenizer import TokenizerSettings, prepare_tokenizer
    torch.set_num_threads(1)
    prepare(DataSettings(base_dir=str(folder), n_people=10, n_chars=60_000))
    prepare_tokenizer(TokenizerSettings(base_dir=str(folder), vocab_size=400))
    here = dict(depth=1, base_dir=str(folder), device="cpu", dtype="float32", compile=False)
    pretrain.train(pretrain.PretrainSettings(**here | settings))
    return folder
