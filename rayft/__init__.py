"""rayft: fine-tune diffusion models with reinforcement learning on Ray."""

__version__ = "0.1.0"


def register_envs() -> None:
    """Called by gymnasium when it is imported: names the domains' environments without importing torch."""
    from gymnasium.envs.registration import register

    for name, domain in (("Toy", "toy"), ("ToyMasked", "toy_masked")):
        register(
            f"{name}-v0",
            entry_point="rayft.env:make",
            vector_entry_point="rayft.env:make_vector",
            kwargs={"domain": domain},
        )
