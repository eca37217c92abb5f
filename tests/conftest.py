"A job in the background may be started with Ctrl-C ignored, and its children inherit that; the tests of interrupts need it to work."
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)
