"""What each kernel was shown to do on which device, and what follows for the choice of one."""
