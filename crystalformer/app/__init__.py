"""What stands on all of it: the command line, trainings from files to reports, a trained model that predicts."""
