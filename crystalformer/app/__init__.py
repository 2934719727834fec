"""The top layer: the command line, trainings from files to reports, a trained model that predicts."""
