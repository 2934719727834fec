// The Python module. It is empty: importing it is enough for the bindings to register themselves.
#include <Python.h>

namespace {

PyModuleDef module_definition = {PyModuleDef_HEAD_INIT,
                                 "_C",
                                 "The CPU kernels: importing it registers them.",
                                 -1,
                                 nullptr,
                                 nullptr,
                                 nullptr,
                                 nullptr,
                                 nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
    return PyModule_Create(&module_definition);
}
