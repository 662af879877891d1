"""The only glue to RLlib: module, runner, learner."""
