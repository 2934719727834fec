// What the bindings need of Python: its lock and its signals. The functions are looked up in the process, not linked,
// so that the library is of no version of Python; in a process without Python nothing of this does anything.
#pragma once

#include <dlfcn.h>

#include <chrono>
#include <stdexcept>
#include <thread>

// pybind11's base of exceptions that set Python's error themselves. Declared here, because its headers need Python's.
// By a pybind11 that had another, these would be a RuntimeError.
namespace pybind11 {

class builtin_exception : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
    virtual void set_error() const = 0;
};

}  // namespace pybind11

namespace crystalformer {

struct Python {
    int (*holds_lock)();
    void* (*release_lock)();
    void (*take_lock_again)(void*);
    int (*take_lock)();
    void (*give_lock_back)(int);
    int (*check_signals)();
    bool here;

    static const Python& functions() {
        static const Python found = [] {
            Python p{};
            p.here = find("PyGILState_Check", &p.holds_lock) && find("PyEval_SaveThread", &p.release_lock) &&
                     find("PyEval_RestoreThread", &p.take_lock_again) && find("PyGILState_Ensure", &p.take_lock) &&
                     find("PyGILState_Release", &p.give_lock_back) && find("PyErr_CheckSignals", &p.check_signals);
            return p;
        }();
        return found;
    }

  private:
    template <class Function>
    static bool find(const char* name, Function* function) {
        *function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
        return *function;
    }
};

// Lets other Python threads run; PyTorch calls some operators with the interpreter locked.
class ReleaseGil {
  public:
    ReleaseGil() : state_(python_.here && python_.holds_lock() ? python_.release_lock() : nullptr) {}
    ~ReleaseGil() {
        if (state_) python_.take_lock_again(state_);
    }
    ReleaseGil(const ReleaseGil&) = delete;
    ReleaseGil& operator=(const ReleaseGil&) = delete;

  private:
    const Python& python_ = Python::functions();
    void* state_;
};

// Python's error, which a signal's handler has raised, is set in the calling thread.
class Interrupted : public pybind11::builtin_exception {
  public:
    Interrupted() : builtin_exception("interrupted by a signal") {}
    void set_error() const override {}
};

// Throws what Python's signal handlers raise, KeyboardInterrupt for one. They run when the thread that called an
// operator asks for it, which costs the interpreter's lock: every tenth of a second is enough.
class PythonSignals {
  public:
    void operator()() {
        if (!python_.here || std::this_thread::get_id() != caller_) return;
        const auto now = std::chrono::steady_clock::now();
        if (now - last_ < std::chrono::milliseconds(100)) return;
        last_ = now;
        const int lock = python_.take_lock();
        const bool raised = python_.check_signals();
        python_.give_lock_back(lock);
        if (raised) throw Interrupted();
    }

  private:
    const Python& python_ = Python::functions();
    std::thread::id caller_ = std::this_thread::get_id();
    std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace crystalformer
