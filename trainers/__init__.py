"""Everything that knows verl: the CPU platform, the engines and the student's workers."""
