"""The recipe of the embedded tiny model: procedural data, three trainings on a CPU, an export, an evaluation."""
