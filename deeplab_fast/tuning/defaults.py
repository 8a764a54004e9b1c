"""What `tune` takes where nothing is said; the command line's help reads it without PyTorch."""

# What people use, where no model is named; the second and third have other activations, and few
# channels.
USUAL_MODELS = (
    ("deeplabv3_resnet50", (520, 520)),
    ("deeplabv3_mobilenet_v3_large", (520, 520)),
    ("deeplabv3_efficientnet_lite0", (360, 480)),
)
BATCHES = (1, 16)
BACKENDS = ("triton", "cuda")
# Of a model, of one form and size of each op, and without a model: the work of several.
SECONDS = 120.0
QUICK_SECONDS = 40.0
ALL_SECONDS = 300.0
