"""`python -m etpp_ssl` and `accelerate launch -m etpp_ssl`: the same as `etpp`."""

from etpp_ssl.cli import main

if __name__ == "__main__":
    main()
